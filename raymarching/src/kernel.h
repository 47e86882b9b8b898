// What the operators do, item by item: each struct holds an operator's arguments and computes item i. cpu.cpp loops over
// the items, cuda.cu gives each a thread. Arrays are row-major and named like the Python functions' arguments.
#pragma once

#include "composite.h"
#include "march.h"

namespace somnium::raymarching {

template <class T>
struct NearFar {
  int64_t items;  // rays
  const T *rays_o, *rays_d, *aabb;
  T min_near;
  T *near, *far;

  HOST_DEVICE void operator()(int64_t i) const {
    near_far(rays_o + 3 * i, rays_d + 3 * i, aabb, min_near, near + i, far + i);
  }
};

struct Morton {
  int64_t items;  // cells
  const int32_t* coords;
  int32_t* indices;

  HOST_DEVICE void operator()(int64_t i) const {
    indices[i] = static_cast<int32_t>(morton(coords[3 * i], coords[3 * i + 1], coords[3 * i + 2]));
  }
};

struct MortonInvert {
  int64_t items;  // cells
  const int32_t* indices;
  int32_t* coords;

  HOST_DEVICE void operator()(int64_t i) const {
    for (int axis = 0; axis < 3; ++axis) {
      coords[3 * i + axis] = static_cast<int32_t>(gather_bits(static_cast<uint32_t>(indices[i]) >> axis));
    }
  }
};

template <class T>
struct Pack {
  int64_t items;  // bytes
  const T* grid;
  T threshold;
  uint8_t* bytes;

  HOST_DEVICE void operator()(int64_t i) const { bytes[i] = pack_byte(grid + 8 * i, threshold); }
};

struct Bricks {
  int64_t items;  // words of the result
  int64_t bricks;  // in one of them: 64 unless the grid is small
  const uint64_t* words;
  uint64_t* result;

  HOST_DEVICE void operator()(int64_t i) const { result[i] = brick_word(words + i * bricks * 8, bricks); }
};

template <class T>
struct Rays {
  const T *origin, *direction, *near, *far, *noise;
  const int32_t* cursor;  // [N, 2]: interval to begin with, samples so far; null: all zero
  int32_t budget, max_steps;

  HOST_DEVICE Ray<T> operator[](int64_t i) const {
    const T *o = origin + 3 * i, *d = direction + 3 * i;
    return {{o[0], o[1], o[2]}, {d[0], d[1], d[2]}, near[i], far[i], noise ? noise[i] : T(0.5)};
  }
  HOST_DEVICE int32_t begin(int64_t i) const { return cursor ? cursor[2 * i] : 0; }
  HOST_DEVICE int32_t taken(int64_t i) const { return cursor ? cursor[2 * i + 1] : 0; }
};

// How many samples each ray will write, and the cursor behind them.
template <class T>
struct Count {
  int64_t items;  // rays
  Rays<T> rays;
  Grid<T> grid;
  Lattice<T> lattice;
  int32_t *counts, *first, *next;  // [N], [N]: interval of the first one, [N, 2]

  HOST_DEVICE void operator()(int64_t i) const {
    const int32_t left = rays.max_steps - rays.taken(i);
    const int32_t room = left < rays.budget ? (left > 0 ? left : 0) : rays.budget;
    int32_t count = 0;
    int32_t found = -1;
    const auto tally = [&](int32_t at, const T*, T, T) {
      if (count++ == 0) found = at;
    };
    const int32_t index = march(grid, lattice, rays[i], rays.begin(i), room, left > room, tally);
    first[i] = found;
    counts[i] = count;
    next[2 * i] = index;
    next[2 * i + 1] = rays.taken(i) + count;
  }
};

template <class T>
struct Write {
  int64_t items;  // rays
  Rays<T> rays;
  Grid<T> grid;
  Lattice<T> lattice;
  const int32_t *table, *first;  // [N, 2]: first sample, number of samples; [N]: interval of the first sample
  T *xyz, *direction, *t;

  HOST_DEVICE void operator()(int64_t i) const {
    const Ray<T> ray = rays[i];
    int64_t at = table[2 * i];
    const auto write = [&](int32_t, const T* position, T middle, T dt) {
      for (int axis = 0; axis < 3; ++axis) {
        xyz[3 * at + axis] = position[axis];
        direction[3 * at + axis] = ray.direction[axis];
      }
      t[2 * at] = middle;
      t[2 * at + 1] = dt;
      ++at;
    };
    march(grid, lattice, ray, first[i], table[2 * i + 1], false, write);
  }
};

// Whether ray i's samples lie within [0, samples): what a table made by hand may get wrong.
HOST_DEVICE bool fits(const int32_t* rays, int64_t i, int64_t samples) {
  return rays[2 * i] >= 0 && rays[2 * i + 1] >= 0 && int64_t(rays[2 * i]) + rays[2 * i + 1] <= samples;
}

// `Channels` is 0 for "as many as `channels` says".
template <class T, int Channels>
struct Composite {
  int64_t items;  // rays
  int64_t samples, channels;
  const T *sigma, *rgb, *t;
  const int32_t* rays;
  T threshold;
  T *weights, *behind;                     // [M], may be null
  T *transmittance, *alpha, *depth, *image;  // added to; transmittance may be null: 1

  HOST_DEVICE void operator()(int64_t i) const {
    if (!fits(rays, i, samples)) return;
    const int64_t first = rays[2 * i];
    Pixel<T> pixel = {transmittance ? transmittance[i] : T(1), alpha[i], depth[i]};
    composite<T, Channels>(sigma + first, rgb + first * channels, t + 2 * first, rays[2 * i + 1], channels, threshold,
                           &pixel, image + i * channels, weights ? weights + first : nullptr,
                           behind ? behind + first : nullptr);
    if (transmittance) transmittance[i] = pixel.transmittance;
    alpha[i] = pixel.alpha;
    depth[i] = pixel.depth;
  }
};

template <class T, int Channels>
struct CompositeBackward {
  int64_t items;  // rays
  int64_t samples, channels;
  const T *rgb, *t, *weights, *behind;
  const int32_t* rays;
  const T *grad_weights, *grad_alpha, *grad_depth, *grad_image;  // each may be null: zero
  T *grad_sigma, *grad_rgb;

  HOST_DEVICE void operator()(int64_t i) const {
    if (!fits(rays, i, samples)) return;
    const int64_t first = rays[2 * i];
    composite_backward<T, Channels>(rgb + first * channels, t + 2 * first, weights + first, behind + first,
                                    rays[2 * i + 1], channels, grad_weights ? grad_weights + first : nullptr,
                                    grad_alpha ? grad_alpha[i] : 0, grad_depth ? grad_depth[i] : 0,
                                    grad_image ? grad_image + i * channels : nullptr, grad_sigma + first,
                                    grad_rgb + first * channels);
  }
};

template <class Body>
void run_cpu(const Body& body);
template <class Body>
const char* run_cuda(const Body& body, void* stream);

// Every instance that the bindings use, for `instance(Body)`; commas inside a Body forbid more than one argument.
#define SOMNIUM_RAYMARCHING_REAL(instance, T)                                                                     \
  instance(NearFar<T>) instance(Pack<T>) instance(Count<T>) instance(Write<T>)                                    \
  instance(Composite<T, 0>) instance(Composite<T, 1>) instance(Composite<T, 3>) instance(Composite<T, 4>)         \
  instance(CompositeBackward<T, 0>) instance(CompositeBackward<T, 1>) instance(CompositeBackward<T, 3>)           \
  instance(CompositeBackward<T, 4>)
#define SOMNIUM_RAYMARCHING_ALL(instance)                                                                         \
  instance(Morton) instance(MortonInvert) instance(Bricks)                                                        \
  SOMNIUM_RAYMARCHING_REAL(instance, float) SOMNIUM_RAYMARCHING_REAL(instance, double)

}  // namespace somnium::raymarching
