// The bodies of compositing, one ray each: the only copy of this arithmetic.
#pragma once

#include <cstring>

#include "platform.h"

namespace somnium::raymarching {

HOST_DEVICE double opacity(double thickness) { return -std::expm1(-thickness); }

// 1 - exp(-thickness) to about two units in the last place, small values included. On the CPU without branches or calls,
// so that the compiler computes a row of them at once: with x = n ln 2 + r, exp(x) - 1 = 2^n (exp(r) - 1) + (2^n - 1).
HOST_DEVICE float opacity(float thickness) {
#ifdef __CUDA_ARCH__
  return -expm1f(-thickness);
#else
  const float x = -thickness < -87.f ? -87.f : (-thickness > 87.f ? 87.f : -thickness);  // keeps a NaN
  const float rounder = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, which then lies in the low bits
  const float shifted = x * 1.44269504f + rounder;
  const float n = shifted - rounder;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits - 0x4B400000 + 127) * (1 << 23);
  float scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  float p = 1.f / 5040;
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r;
  return -(scale * p + (scale - 1));
#endif
}

// How many opacities are computed in a row.
#ifdef __CUDA_ARCH__
constexpr int row_length = 1;
#else
constexpr int row_length = 64;
#endif

template <class T>
struct Pixel {
  T transmittance, alpha, depth;
};

// Front to back: weight = T (1 - exp(-sigma dt)), T the light that is left; ends once T < threshold. `Channels` is the
// number of channels where it is known when compiling, else 0 and `channels` counts. `image` is added to. `weights` and
// `behind` (T after the sample; 0 where the ray has ended, which makes every gradient there zero) may be null.
template <class T, int Channels>
HOST_DEVICE void composite(const T* sigma, const T* rgb, const T* t, int64_t count, int64_t channels, T threshold,
                           Pixel<T>* pixel, T* image, T* weights, T* behind) {
  if (Channels) channels = Channels;
  T light = pixel->transmittance, alpha = 0, depth = 0;
  T sum[Channels ? Channels : 1] = {};
  T row[row_length];
  int64_t done = 0;
  while (done < count && !(light < threshold)) {
    const int length = static_cast<int>(count - done < row_length ? count - done : row_length);
    for (int i = 0; i < length; ++i) row[i] = opacity(sigma[done + i] * t[2 * (done + i) + 1]);
    int i = 0;
    for (; i < length && !(light < threshold); ++i, ++done) {
      const T weight = light * row[i];
      light *= 1 - row[i];
      alpha += weight;
      depth += weight * t[2 * done];
      if (Channels) {
        for (int c = 0; c < Channels; ++c) sum[c] += weight * rgb[done * Channels + c];
      } else {
        for (int64_t c = 0; c < channels; ++c) image[c] += weight * rgb[done * channels + c];
      }
      if (weights) weights[done] = weight;
      if (behind) behind[done] = light;
    }
  }
  for (; done < count; ++done) {
    if (weights) weights[done] = 0;
    if (behind) behind[done] = 0;
  }
  for (int c = 0; c < Channels; ++c) image[c] += sum[c];
  pixel->transmittance = light;
  pixel->alpha += alpha;
  pixel->depth += depth;
}

// Back to front. With q_i the gradient of the loss by the weight of sample i through all four outputs,
// d loss / d sigma_i = dt_i (q_i T_after_i - sum over j > i of q_j w_j), and d loss / d rgb_i = w_i d loss / d image.
template <class T, int Channels>
HOST_DEVICE void composite_backward(const T* rgb, const T* t, const T* weights, const T* behind, int64_t count,
                                    int64_t channels, const T* grad_weights, T grad_alpha, T grad_depth,
                                    const T* grad_image, T* grad_sigma, T* grad_rgb) {
  if (Channels) channels = Channels;
  T after = 0;
  for (int64_t i = count - 1; i >= 0; --i) {
    T q = grad_alpha + grad_depth * t[2 * i];
    if (grad_weights) q += grad_weights[i];
    const T weight = weights[i];
    for (int64_t c = 0; c < channels; ++c) {
      const T grad = grad_image ? grad_image[c] : 0;
      q += grad * rgb[i * channels + c];
      grad_rgb[i * channels + c] = weight * grad;
    }
    grad_sigma[i] = t[2 * i + 1] * (q * behind[i] - after);
    after += q * weight;
  }
}

}  // namespace somnium::raymarching
