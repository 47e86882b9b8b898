// Registers somnium_freqencoder::encode and ::input_gradient; everything a caller can get wrong is checked here.
#include "bindings.h"

#include "kernel.h"

namespace somnium::freqencoder {
namespace {

Shape checked_shape(const Tensor& x, const std::optional<Tensor>& direction, int64_t degree, int64_t active) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "x must be float32 or float64");
  STD_TORCH_CHECK(0 <= degree && degree <= 60, "degree must lie in 0 .. 60, got ", degree);
  STD_TORCH_CHECK(0 <= active && active <= degree, "active must lie in 0 .. degree, got ", active);
  check(x, "x", x, type, {any_size, any_size});
  if (direction) check(*direction, "direction", x, type, {x.size(0), x.size(1)});
  return {x.size(0), x.size(1), static_cast<int>(degree), static_cast<int>(active)};
}

template <class T>
void run_encode(const Shape& shape, const Tensor& x, const std::optional<Tensor>& direction, Tensor& out) {
#ifdef USE_CUDA
  if (x.is_cuda()) {
    const Launch launch(x);
    return check_launch(encode_cuda(shape, read<T>(x), read<T>(direction), write<T>(out), launch.stream()));
  }
#endif
  encode_cpu(shape, read<T>(x), read<T>(direction), write<T>(out));
}

template <class T>
void run_input_gradient(const Shape& shape, const Tensor& grad, const Tensor& x,
                        const std::optional<Tensor>& direction, Tensor& out) {
#ifdef USE_CUDA
  if (x.is_cuda()) {
    const Launch launch(x);
    return check_launch(
        input_gradient_cuda(shape, read<T>(grad), read<T>(x), read<T>(direction), write<T>(out), launch.stream()));
  }
#endif
  input_gradient_cpu(shape, read<T>(grad), read<T>(x), read<T>(direction), write<T>(out));
}

Tensor encode(const Tensor& x, const std::optional<Tensor>& direction, int64_t degree, int64_t active) {
  const Shape shape = checked_shape(x, direction, degree, active);
  Tensor out = new_output(x, {shape.count, shape.width()}, x.scalar_type());
  const bool wide = x.scalar_type() == ScalarType::Double;
  (wide ? run_encode<double> : run_encode<float>)(shape, x, direction, out);
  return out;
}

Tensor input_gradient(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& direction, int64_t degree,
                      int64_t active) {
  const Shape shape = checked_shape(x, direction, degree, active);
  check(grad, "grad", x, x.scalar_type(), {shape.count, shape.width()});
  Tensor out = new_output(x, {shape.count, shape.dims}, x.scalar_type());
  const bool wide = x.scalar_type() == ScalarType::Double;
  (wide ? run_input_gradient<double> : run_input_gradient<float>)(shape, grad, x, direction, out);
  return out;
}

}  // namespace
}  // namespace somnium::freqencoder

STABLE_TORCH_LIBRARY(somnium_freqencoder, library) {
  library.def("encode(Tensor x, Tensor? direction, int degree, int active) -> Tensor");
  library.def("input_gradient(Tensor grad, Tensor x, Tensor? direction, int degree, int active) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(somnium_freqencoder, CPU, library) {
  library.impl("encode", TORCH_BOX(&somnium::freqencoder::encode));
  library.impl("input_gradient", TORCH_BOX(&somnium::freqencoder::input_gradient));
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(somnium_freqencoder, CUDA, library) {
  library.impl("encode", TORCH_BOX(&somnium::freqencoder::encode));
  library.impl("input_gradient", TORCH_BOX(&somnium::freqencoder::input_gradient));
}
#endif
