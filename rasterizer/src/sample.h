// A picture, or a chain of smaller and smaller ones, looked up at texture coordinates.
#pragma once

#include "triangle.h"

namespace somnium::rasterizer {

constexpr int max_levels = 32;

struct Level {
  int64_t first;  // texel of the chain
  int32_t height, width;
};

struct Levels {
  Level level[max_levels];
  int32_t count;
  int64_t texels;  // of the chain
};

// The four texels around a point and their weights; dx, dy: the weights' slopes by u and v.
template <class T>
struct Taps {
  int64_t texel[4];
  T weight[4], du[4], dv[4];
};

// Between which two texels a coordinate lies, the fraction, and the fraction's slope by the coordinate.
template <class T>
struct Place {
  int32_t low, high;
  T fraction, slope;

  HOST_DEVICE Place(T coordinate, int32_t size, bool clamp) {
    slope = static_cast<T>(size);
    T at = (clamp ? coordinate : coordinate - std::floor(coordinate)) * size - T(0.5);
    if (clamp) {
      const T last = static_cast<T>(size - 1);
      if (!(at >= 0 && at <= last)) slope = 0;
      at = at < 0 ? 0 : at > last ? last : at;
    }
    const T floor = std::floor(at);
    fraction = at - floor;
    low = static_cast<int32_t>(floor);
    high = low + 1 < size ? low + 1 : clamp ? size - 1 : 0;
    if (low < 0) low = size - 1;
  }
};

template <class T>
HOST_DEVICE Taps<T> taps_of(const Level& level, T u, T v, bool clamp) {
  const Place<T> x(u, level.width, clamp), y(v, level.height, clamp);
  Taps<T> taps;
  UNROLL for (int k = 0; k < 4; ++k) {
    const bool right = k & 1, below = k & 2;
    taps.texel[k] = level.first + static_cast<int64_t>(below ? y.high : y.low) * level.width + (right ? x.high : x.low);
    const T wx = right ? x.fraction : 1 - x.fraction, wy = below ? y.fraction : 1 - y.fraction;
    taps.weight[k] = wx * wy;
    taps.du[k] = (right ? x.slope : -x.slope) * wy;
    taps.dv[k] = (below ? y.slope : -y.slope) * wx;
  }
  return taps;
}

// What the look-ups of all pixels share. chain [b, texels, C] is one for all views if b = 1; lod [B, H, W] or null.
template <class T>
struct Sampler {
  const T *uv, *lod;
  Levels levels;
  int64_t channels, pixels, shared;  // pixels: of a view
  bool clamp;

  // Calls body(taps, weight) for the one or two levels that pixel i is looked up in.
  template <class Body>
  HOST_DEVICE void for_levels(int64_t i, const Body& body) const {
    const T u = uv[2 * i], v = uv[2 * i + 1];
    if (!std::isfinite(u) || !std::isfinite(v)) return;
    const T detail = lod ? lod[i] : T(0);
    const T most = static_cast<T>(levels.count - 1);
    const T at = detail > 0 ? (detail < most ? detail : most) : T(0);  // NaN: 0
    const int32_t low = static_cast<int32_t>(at);
    const T fraction = at - low;
    body(taps_of(levels.level[low], u, v, clamp), 1 - fraction);
    if (fraction > 0) body(taps_of(levels.level[low + 1], u, v, clamp), fraction);
  }
  HOST_DEVICE int64_t first_texel(int64_t i) const { return shared ? 0 : i / pixels * levels.texels; }
};

template <class T>
struct Sample {
  int64_t items;  // pixels
  Sampler<T> from;
  const T* chain;
  T* out;

  HOST_DEVICE void operator()(int64_t i) const {
    const int64_t C = from.channels, first = from.first_texel(i);
    for (int64_t c = 0; c < C; ++c) out[C * i + c] = 0;
    from.for_levels(i, [&](const Taps<T>& taps, T share) {
      UNROLL for (int k = 0; k < 4; ++k) {
        const T weight = share * taps.weight[k];
        const T* texel = chain + C * (first + taps.texel[k]);
        for (int64_t c = 0; c < C; ++c) out[C * i + c] += weight * texel[c];
      }
    });
  }
};

// The gradient in uv.
template <class T>
struct SamplePlaceGradient {
  int64_t items;  // pixels
  Sampler<T> from;
  const T *chain, *grad;
  T* out;  // [B, H, W, 2]

  HOST_DEVICE void operator()(int64_t i) const {
    const int64_t C = from.channels, first = from.first_texel(i);
    T gu = 0, gv = 0;
    from.for_levels(i, [&](const Taps<T>& taps, T share) {
      UNROLL for (int k = 0; k < 4; ++k) {
        const T* texel = chain + C * (first + taps.texel[k]);
        T product = 0;
        for (int64_t c = 0; c < C; ++c) product += grad[C * i + c] * texel[c];
        gu += share * taps.du[k] * product;
        gv += share * taps.dv[k] * product;
      }
    });
    out[2 * i] = gu;
    out[2 * i + 1] = gv;
  }
};

template <class T>
struct SampleGradient {
  int64_t items;  // pixels
  Sampler<T> from;
  const T* grad;
  Target<T> target;  // [b texels, C]

  template <class Add>
  HOST_DEVICE void operator()(int64_t i, const Add& add) const {
    const int64_t C = from.channels, first = from.first_texel(i);
    from.for_levels(i, [&](const Taps<T>& taps, T share) {
      UNROLL for (int k = 0; k < 4; ++k) {
        const int64_t row = first + taps.texel[k];
        if (!add.wants(row)) continue;
        const T weight = share * taps.weight[k];
        for (int64_t c = 0; c < C; ++c) add(C * row + c, weight * grad[C * i + c]);
      }
    });
  }
};

}  // namespace somnium::rasterizer
