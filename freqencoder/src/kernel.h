// Frequency encoding: x, then sin(2^k x), cos(2^k x) for k = 0 .. degree - 1; the arithmetic for one coordinate.
#pragma once

#include "platform.h"

namespace somnium::freqencoder {

// Arrays are row-major: x, direction [count, dims]; outputs and their gradients [count, dims * (1 + 2 * degree)].
struct Shape {
  int64_t count;
  int64_t dims;
  int degree;
  int active;  // bands from here on are zero
  HOST_DEVICE int64_t width() const { return dims * (1 + 2 * degree); }
};

// direction may be null; with it the derivative along it is written instead of the value.
template <class T>
void encode_cpu(const Shape& shape, const T* x, const T* direction, T* out);
template <class T>
const char* encode_cuda(const Shape& shape, const T* x, const T* direction, T* out, void* stream);

// out[count, dims]: gradient of <grad, encoding> in x; with a direction, that gradient's derivative along it.
template <class T>
void input_gradient_cpu(const Shape& shape, const T* grad, const T* x, const T* direction, T* out);
template <class T>
const char* input_gradient_cuda(const Shape& shape, const T* grad, const T* x, const T* direction, T* out,
                                void* stream);

template <class Real>
struct SineCosine {
  Real sine, cosine;
};

// One of the two columns that a band adds to a coordinate, or its derivative along v (value = false).
template <class Real, class Scale>
HOST_DEVICE SineCosine<Real> band_forward(SineCosine<Real> wave, Scale frequency, Real v, bool value) {
  if (value) return wave;
  return {frequency * wave.cosine * v, -frequency * wave.sine * v};
}

// What a band adds to the gradient in x (value), or to its derivative (the caller multiplies by v at the end).
template <class Real, class Scale>
HOST_DEVICE Real band_gradient(SineCosine<Real> wave, SineCosine<Real> grad, Scale frequency, bool value) {
  if (value) return frequency * (grad.sine * wave.cosine - grad.cosine * wave.sine);
  return -(frequency * frequency) * (grad.sine * wave.sine + grad.cosine * wave.cosine);
}

}  // namespace somnium::freqencoder
