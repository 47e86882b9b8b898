// Registers somnium_shencoder::encode and ::input_gradient; everything a caller can get wrong is checked here.
#include "bindings.h"

#include "kernel.h"

namespace somnium::shencoder {
namespace {

Shape checked_shape(const Tensor& x, const std::optional<Tensor>& direction, int64_t degree) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "x must be float32 or float64");
  STD_TORCH_CHECK(1 <= degree && degree <= max_degree, "degree must lie in 1 .. ", max_degree, ", got ", degree);
  check(x, "x", x, type, {any_size, 3});
  if (direction) check(*direction, "direction", x, type, {x.size(0), 3});
  return {x.size(0), static_cast<int>(degree)};
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

Tensor encode_op(const Tensor& x, const std::optional<Tensor>& direction, int64_t degree) {
  const Shape shape = checked_shape(x, direction, degree);
  Tensor out = torch::stable::new_empty(x, {shape.count, shape.width()});
  const bool wide = x.scalar_type() == ScalarType::Double;
  (wide ? run_encode<double> : run_encode<float>)(shape, x, direction, out);
  return out;
}

Tensor input_gradient_op(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& direction, int64_t degree) {
  const Shape shape = checked_shape(x, direction, degree);
  check(grad, "grad", x, x.scalar_type(), {shape.count, shape.width()});
  Tensor out = torch::stable::new_empty(x, {shape.count, 3});
  const bool wide = x.scalar_type() == ScalarType::Double;
  (wide ? run_input_gradient<double> : run_input_gradient<float>)(shape, grad, x, direction, out);
  return out;
}

}  // namespace
}  // namespace somnium::shencoder

STABLE_TORCH_LIBRARY(somnium_shencoder, library) {
  library.def("encode(Tensor x, Tensor? direction, int degree) -> Tensor");
  library.def("input_gradient(Tensor grad, Tensor x, Tensor? direction, int degree) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(somnium_shencoder, CPU, library) {
  library.impl("encode", TORCH_BOX(&somnium::shencoder::encode_op));
  library.impl("input_gradient", TORCH_BOX(&somnium::shencoder::input_gradient_op));
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(somnium_shencoder, CUDA, library) {
  library.impl("encode", TORCH_BOX(&somnium::shencoder::encode_op));
  library.impl("input_gradient", TORCH_BOX(&somnium::shencoder::input_gradient_op));
}
#endif
