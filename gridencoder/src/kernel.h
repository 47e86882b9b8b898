// Multi-resolution grid: a point lies in one cell per level, its features are those of the cell's corners, interpolated.
// The arithmetic for one point and one level (or, on the CPU, for a vector of points), and the launchers.
#pragma once

#include "half.h"
#include "platform.h"

namespace somnium::gridencoder {

constexpr int max_levels = 32;
constexpr int max_dims = 5;

struct Level {
  int64_t offset;                // first entry in the table
  int64_t entries;               // how many there are
  uint32_t resolution;           // vertices per axis, at least 2
  uint32_t multiplier[max_dims];  // an index is the sum (dense, tiled) or the exclusive or (hash) of vertex * multiplier
  uint32_t mask;
  bool hashed;
};

// Arrays are row-major: x, direction [count, dims]; table [entries, features]; outputs [count, levels * features].
struct Grid {
  int64_t count;
  int dims, levels, features;
  int active;  // levels from here on are zero
  bool smoothstep, align_corners;
  double bound;  // points lie in [-bound, bound]^dims; the features of others are zero
  Level level[max_levels];
  HOST_DEVICE int64_t width() const { return static_cast<int64_t>(levels) * features; }
};

// All take a direction or null. With one, what is computed is the derivative along it: of the encoding, of the gradient
// in the table, of the gradient in x. Together these are all that a double backward needs.
template <class Entry>
using RealOf = typename Storage<Entry>::Real;

template <class Entry>
struct Arrays {
  const RealOf<Entry>* x;
  const RealOf<Entry>* direction;
  const Entry* table;
  const Entry* grad;
};

template <class Entry>
void encode_cpu(const Grid& grid, const Arrays<Entry>& arrays, Entry* out);
template <class Entry>
void table_gradient_cpu(const Grid& grid, const Arrays<Entry>& arrays, RealOf<Entry>* out);
template <class Entry>
void input_gradient_cpu(const Grid& grid, const Arrays<Entry>& arrays, RealOf<Entry>* out);
// Adds weight * d/dt sqrt(sum (t - t_neighbour)^2 + 1e-9) for the vertex nearest to each point; see reference.py.
template <class Entry>
void variation_gradient_cpu(const Grid& grid, const Arrays<Entry>& arrays, double weight, RealOf<Entry>* out);

template <class Entry>
const char* encode_cuda(const Grid& grid, const Arrays<Entry>& arrays, Entry* out, void* stream);
template <class Entry>
const char* table_gradient_cuda(const Grid& grid, const Arrays<Entry>& arrays, RealOf<Entry>* out, void* stream);
template <class Entry>
const char* input_gradient_cuda(const Grid& grid, const Arrays<Entry>& arrays, RealOf<Entry>* out, void* stream);
template <class Entry>
const char* variation_gradient_cuda(const Grid& grid, const Arrays<Entry>& arrays, double weight, RealOf<Entry>* out,
                                    void* stream);

// Where a point lies in a level. Real is a number or a vector of numbers, one per point; Scalar the type of one.
template <class Real, int D>
struct Place {
  typename Lane<Real>::Index low[D];  // the cell's lower vertex, times the axis's multiplier
  Real upper[D];                      // weight of the upper vertex
  Real slope[D], bend[D];             // first and second derivative of `upper` in x
  Real inside;                        // 1 or 0
};

// Grid coordinate of u = x / (2 bound) + 1/2 in [0, 1].
template <class Scalar, class Real>
HOST_DEVICE Real coordinate(const Grid& grid, const Level& level, Real u) {
  const Scalar last = static_cast<Scalar>(level.resolution - 1);
  if (grid.align_corners) return u * last;
  const Real free = u * (last + 1) - Scalar(0.5);
  const Real floor = free > Real{} ? free : Real{};
  return floor < last ? floor : Real{} + last;
}

template <class Scalar, class Real, int D>
HOST_DEVICE Place<Real, D> locate(const Grid& grid, const Level& level, const Real* x) {
  using Int = typename Lane<Real>::Int;
  using Index = typename Lane<Real>::Index;
  const Scalar bound = static_cast<Scalar>(grid.bound);
  const Scalar scale = static_cast<Scalar>(0.5 / grid.bound);
  const Scalar last = static_cast<Scalar>(level.resolution - 1);
  const Scalar steep = (grid.align_corners ? last : last + 1) * scale;
  const Real zero = {}, one = zero + 1;
  Place<Real, D> place;
  place.inside = one;
UNROLL
  for (int d = 0; d < D; ++d) {
    place.inside = x[d] >= -bound ? place.inside : zero;
    place.inside = x[d] <= bound ? place.inside : zero;
  }
UNROLL
  for (int d = 0; d < D; ++d) {
    const Real u = place.inside > 0 ? (x[d] + bound) * scale : zero;
    const Real free = u * (last + 1) - Scalar(0.5);
    const Real at = coordinate<Scalar>(grid, level, u);
    const Real whole = convert<Real>(convert<Int>(at));
    const Real cell = whole < last - 1 ? whole : zero + (last - 1);
    const Real f = at - cell;
    Real rate = place.inside * steep;
    if (!grid.align_corners) {  // half a cell from the border the nearest vertex's value continues unchanged
      rate = free >= 0 ? rate : zero;
      rate = free <= last ? rate : zero;
    }
    place.low[d] = convert<Index>(convert<Int>(cell)) * level.multiplier[d];
    place.upper[d] = grid.smoothstep ? f * f * (3 - 2 * f) : f;
    place.slope[d] = grid.smoothstep ? 6 * f * (1 - f) * rate : rate;
    place.bend[d] = grid.smoothstep ? (6 - 12 * f) * rate * rate : zero;
  }
  return place;
}

// The entries of the 2^D corners; bit d of a corner's number says whether it is the upper one on axis d.
template <class Index, int D>
HOST_DEVICE void corner_entries(const Level& level, const Index* low, Index* entries) {
  entries[0] = Index{};
UNROLL
  for (int d = 0; d < D; ++d) {
    const Index high = low[d] + level.multiplier[d];
UNROLL
    for (int k = 0; k < 1 << d; ++k) {
      entries[k + (1 << d)] = level.hashed ? entries[k] ^ high : entries[k] + high;
      entries[k] = level.hashed ? entries[k] ^ low[d] : entries[k] + low[d];
    }
  }
UNROLL
  for (int k = 0; k < 1 << D; ++k) entries[k] &= level.mask;
}

// The corners' weights w, or (v given) their derivatives along v: each axis doubles the list, by the product rule.
template <class Real, int D>
HOST_DEVICE void corner_weights(const Place<Real, D>& place, const Real* v, Real* out) {
  Real w[1 << D], t[1 << D];
  w[0] = place.inside;
  t[0] = Real{};
UNROLL
  for (int d = 0; d < D; ++d) {
UNROLL
    for (int k = 0; k < 1 << d; ++k) {
      const int high = k + (1 << d);
      w[high] = w[k] * place.upper[d];
      if (v) {
        t[high] = t[k] * place.upper[d] + w[k] * (place.slope[d] * v[d]);
        t[k] = t[k] - t[high];
      }
      w[k] = w[k] - w[high];
    }
  }
UNROLL
  for (int k = 0; k < 1 << D; ++k) out[k] = v ? t[k] : w[k];
}

// Adds the gradient in x of the interpolant of corner values a (or, v given, that gradient's derivative along v).
// Folds one axis after the other, last first: values a interpolate, and so do the derivatives g[e] along axes folded
// before; t and gt are the derivatives of a and g along v. Overwrites a.
template <class Real, int D>
HOST_DEVICE void add_gradient(const Place<Real, D>& place, Real* a, const Real* v, Real* sum) {
  Real t[1 << D], g[D][1 << (D - 1)], gt[D][1 << (D - 1)];
  UNROLL
  for (int k = 0; k < 1 << D; ++k) t[k] = Real{};
  UNROLL
  for (int d = D - 1; d >= 0; --d) {
    const Real upper = place.upper[d], slope = place.slope[d];
    const Real rate = v ? slope * v[d] : Real{}, turn = v ? place.bend[d] * v[d] : Real{};
    UNROLL
    for (int k = 0; k < 1 << d; ++k) {
      const int high = k + (1 << d);
      UNROLL
      for (int e = d + 1; e < D; ++e) {
        const Real step = g[e][high] - g[e][k];
        if (v) gt[e][k] += upper * (gt[e][high] - gt[e][k]) + rate * step;
        g[e][k] += upper * step;
      }
      const Real step = a[high] - a[k];
      if (v) {
        const Real step_t = t[high] - t[k];
        gt[d][k] = slope * step_t + turn * step;
        t[k] += upper * step_t + rate * step;
      }
      g[d][k] = slope * step;
      a[k] += upper * step;
    }
  }
  UNROLL
  for (int d = 0; d < D; ++d) sum[d] += v ? gt[d][0] : g[d][0];
}

// One vertex's share of the total variation, feature by feature: calls add(entry, feature, gradient).
template <class Entry, class Add>
HOST_DEVICE void variation_at(const Grid& grid, const Level& level, const RealOf<Entry>* x, const Entry* table,
                              RealOf<Entry> weight, const Add& add) {
  using Real = RealOf<Entry>;
  const Real bound = static_cast<Real>(grid.bound);
  uint32_t vertex[max_dims], own = 0;
  for (int d = 0; d < grid.dims; ++d) {
    if (!(x[d] >= -bound && x[d] <= bound)) return;
    const Real at = coordinate<Real>(grid, level, (x[d] + bound) * static_cast<Real>(0.5 / grid.bound));
    vertex[d] = static_cast<uint32_t>(at + Real(0.5));
    if (vertex[d] > level.resolution - 1) vertex[d] = level.resolution - 1;
    const uint32_t term = vertex[d] * level.multiplier[d];
    own = level.hashed ? own ^ term : own + term;
  }
  const int64_t entry = level.offset + (own & level.mask);
  for (int f = 0; f < grid.features; ++f) {
    const Real value = Storage<Entry>::get(table[entry * grid.features + f]);
    Real sum = 0, squares = Real(1e-9);
    for (int d = 0; d < grid.dims; ++d) {
      const uint32_t term = vertex[d] * level.multiplier[d];
      for (int side = 0; side < 2; ++side) {
        if (vertex[d] == (side ? level.resolution - 1 : 0u)) continue;  // no neighbour beyond the border
        const uint32_t moved = side ? term + level.multiplier[d] : term - level.multiplier[d];
        const uint32_t other = (level.hashed ? own ^ term ^ moved : own - term + moved) & level.mask;
        const Real step = value - Storage<Entry>::get(table[(level.offset + other) * grid.features + f]);
        sum += step;
        squares += step * step;
      }
    }
    add(entry, f, weight * sum / std::sqrt(squares));
  }
}

}  // namespace somnium::gridencoder
