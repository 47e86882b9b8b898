// CUDA launches: one thread per coordinate of a point.
#include "cuda_launch.h"
#include "kernel.h"

namespace somnium::freqencoder {
namespace {

__device__ SineCosine<float> sine_cosine(float angle) {
  SineCosine<float> wave;
  sincosf(angle, &wave.sine, &wave.cosine);
  return wave;
}

__device__ SineCosine<double> sine_cosine(double angle) {
  SineCosine<double> wave;
  sincos(angle, &wave.sine, &wave.cosine);
  return wave;
}

template <class T>
__global__ void encode(const Shape shape, const T* __restrict__ x, const T* __restrict__ direction,
                       T* __restrict__ out) {
  SOMNIUM_FOR_EACH(i, shape.count * shape.dims) {
    const bool value = direction == nullptr;
    const T v = value ? T(0) : direction[i];
    T* row = out + i / shape.dims * shape.width() + i % shape.dims;
    row[0] = value ? x[i] : v;
    T frequency = 1;
    for (int k = 0; k < shape.degree; ++k, frequency *= 2) {
      SineCosine<T> wave = {T(0), T(0)};
      if (k < shape.active) wave = band_forward(sine_cosine(frequency * x[i]), frequency, v, value);
      row[(1 + 2 * k) * shape.dims] = wave.sine;
      row[(2 + 2 * k) * shape.dims] = wave.cosine;
    }
  }
}

template <class T>
__global__ void input_gradient(const Shape shape, const T* __restrict__ grad, const T* __restrict__ x,
                               const T* __restrict__ direction, T* __restrict__ out) {
  SOMNIUM_FOR_EACH(i, shape.count * shape.dims) {
    const bool value = direction == nullptr;
    const T* row = grad + i / shape.dims * shape.width() + i % shape.dims;
    T sum = value ? row[0] : T(0);
    T frequency = 1;
    for (int k = 0; k < shape.active; ++k, frequency *= 2) {
      const SineCosine<T> g = {row[(1 + 2 * k) * shape.dims], row[(2 + 2 * k) * shape.dims]};
      sum += band_gradient(sine_cosine(frequency * x[i]), g, frequency, value);
    }
    out[i] = value ? sum : sum * direction[i];
  }
}

}  // namespace

template <class T>
const char* encode_cuda(const Shape& shape, const T* x, const T* direction, T* out, void* stream) {
  const int64_t items = shape.count * shape.dims;
  if (items == 0) return nullptr;
  encode<<<blocks_for(items), threads_per_block, 0, static_cast<cudaStream_t>(stream)>>>(shape, x, direction, out);
  return launch_error();
}

template <class T>
const char* input_gradient_cuda(const Shape& shape, const T* grad, const T* x, const T* direction, T* out,
                                void* stream) {
  const int64_t items = shape.count * shape.dims;
  if (items == 0) return nullptr;
  input_gradient<<<blocks_for(items), threads_per_block, 0, static_cast<cudaStream_t>(stream)>>>(shape, grad, x,
                                                                                                 direction, out);
  return launch_error();
}

template const char* encode_cuda(const Shape&, const float*, const float*, float*, void*);
template const char* encode_cuda(const Shape&, const double*, const double*, double*, void*);
template const char* input_gradient_cuda(const Shape&, const float*, const float*, const float*, float*, void*);
template const char* input_gradient_cuda(const Shape&, const double*, const double*, const double*, double*, void*);

}  // namespace somnium::freqencoder
