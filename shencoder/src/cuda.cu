// CUDA launches: one thread per direction.
#include "cuda_launch.h"
#include "kernel.h"

namespace somnium::shencoder {
namespace {

template <class T, int degree>
__global__ void encode_points(const int64_t count, const T* __restrict__ x, const T* __restrict__ direction,
                              T* __restrict__ out) {
  SOMNIUM_FOR_EACH(i, count) {
    T* row = out + i * degree * degree;
    const auto store = [row](int index, T column) { row[index] = column; };
    encode<T, degree>(x + 3 * i, direction ? direction + 3 * i : nullptr, store);
  }
}

template <class T, int degree>
__global__ void gradient_of_points(const int64_t count, const T* __restrict__ grad, const T* __restrict__ x,
                                   const T* __restrict__ direction, T* __restrict__ out) {
  SOMNIUM_FOR_EACH(i, count) {
    const T* row = grad + i * degree * degree;
    const auto load = [row](int index) { return row[index]; };
    input_gradient<T, degree>(x + 3 * i, direction ? direction + 3 * i : nullptr, out + 3 * i, load);
  }
}

}  // namespace

template <class T>
const char* encode_cuda(const Shape& shape, const T* x, const T* direction, T* out, void* stream) {
  if (shape.count == 0) return nullptr;
  with_degree(shape.degree, [&](auto degree) {
    encode_points<T, degree.value><<<blocks_for(shape.count), threads_per_block, 0, static_cast<cudaStream_t>(stream)>>>(
        shape.count, x, direction, out);
  });
  return launch_error();
}

template <class T>
const char* input_gradient_cuda(const Shape& shape, const T* grad, const T* x, const T* direction, T* out,
                                void* stream) {
  if (shape.count == 0) return nullptr;
  with_degree(shape.degree, [&](auto degree) {
    gradient_of_points<T, degree.value>
        <<<blocks_for(shape.count), threads_per_block, 0, static_cast<cudaStream_t>(stream)>>>(shape.count, grad, x,
                                                                                               direction, out);
  });
  return launch_error();
}

template const char* encode_cuda(const Shape&, const float*, const float*, float*, void*);
template const char* encode_cuda(const Shape&, const double*, const double*, double*, void*);
template const char* input_gradient_cuda(const Shape&, const float*, const float*, const float*, float*, void*);
template const char* input_gradient_cuda(const Shape&, const double*, const double*, const double*, double*, void*);

}  // namespace somnium::shencoder
