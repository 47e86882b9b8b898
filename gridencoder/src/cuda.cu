// CUDA launches: one thread per point and level (the gradient in x: per point), levels in order, so that the threads at
// work share one level's table in cache. Scatter-adds are atomic, in float32 even where the table is half.
#include "cuda_launch.h"
#include "kernel.h"

namespace somnium::gridencoder {
namespace {

template <class Real, int D>
struct Point {
  Real x[D], v[D];
};

template <class Entry, int D>
__device__ Point<RealOf<Entry>, D> point_at(const Arrays<Entry>& arrays, int64_t n) {
  Point<RealOf<Entry>, D> point;
  UNROLL
  for (int d = 0; d < D; ++d) {
    point.x[d] = arrays.x[n * D + d];
    point.v[d] = arrays.direction ? arrays.direction[n * D + d] : 0;
  }
  return point;
}

// The corners of one point in one level: their entries, and their weights or the weights' derivatives along v.
template <class Real, int D>
struct Corners {
  uint32_t entry[1 << D];
  Real weight[1 << D];

  __device__ Corners(const Grid& grid, const Level& level, const Point<Real, D>& point, bool directional) {
    const auto place = locate<Real, Real, D>(grid, level, point.x);
    corner_entries<uint32_t, D>(level, place.low, entry);
    if (directional) {
      corner_weights<Real, D>(place, point.v, weight);
    } else {
      corner_weights<Real, D>(place, nullptr, weight);
    }
  }
};

template <class Entry, int D>
__global__ void encode(const __grid_constant__ Grid grid, const __grid_constant__ Arrays<Entry> arrays,
                       Entry* __restrict__ out) {
  using Real = RealOf<Entry>;
  SOMNIUM_FOR_EACH(item, grid.count * grid.levels) {
    const int l = item / grid.count;
    const int64_t n = item % grid.count;
    const int F = grid.features;
    Entry* to = out + n * grid.width() + l * F;
    if (l >= grid.active) {
      for (int f = 0; f < F; ++f) to[f] = Storage<Entry>::put(0);
      continue;
    }
    const Level& level = grid.level[l];
    const Corners<Real, D> corners(grid, level, point_at<Entry, D>(arrays, n), arrays.direction != nullptr);
    const Entry* table = arrays.table + level.offset * F;
    for (int f = 0; f < F; ++f) {
      Real sum = 0;
      UNROLL
      for (int k = 0; k < 1 << D; ++k) {
        sum += corners.weight[k] * Storage<Entry>::get(table[static_cast<int64_t>(corners.entry[k]) * F + f]);
      }
      to[f] = Storage<Entry>::put(sum);
    }
  }
}

template <class Entry, int D>
__global__ void table_gradient(const __grid_constant__ Grid grid, const __grid_constant__ Arrays<Entry> arrays,
                               RealOf<Entry>* __restrict__ out) {
  using Real = RealOf<Entry>;
  SOMNIUM_FOR_EACH(item, grid.count * grid.active) {
    const int l = item / grid.count;
    const int64_t n = item % grid.count;
    const int F = grid.features;
    const Level& level = grid.level[l];
    const Corners<Real, D> corners(grid, level, point_at<Entry, D>(arrays, n), arrays.direction != nullptr);
    const Entry* grad = arrays.grad + n * grid.width() + l * F;
    Real* table = out + level.offset * F;
    for (int f = 0; f < F; ++f) {
      const Real g = Storage<Entry>::get(grad[f]);
      UNROLL
      for (int k = 0; k < 1 << D; ++k) {
        atomicAdd(table + static_cast<int64_t>(corners.entry[k]) * F + f, corners.weight[k] * g);
      }
    }
  }
}

template <class Entry, int D>
__global__ void input_gradient(const __grid_constant__ Grid grid, const __grid_constant__ Arrays<Entry> arrays,
                               RealOf<Entry>* __restrict__ out) {
  using Real = RealOf<Entry>;
  SOMNIUM_FOR_EACH(n, grid.count) {
    const Point<Real, D> point = point_at<Entry, D>(arrays, n);
    const int F = grid.features;
    Real sum[D] = {};
    for (int l = 0; l < grid.active; ++l) {
      const Level& level = grid.level[l];
      const auto place = locate<Real, Real, D>(grid, level, point.x);
      uint32_t entry[1 << D];
      corner_entries<uint32_t, D>(level, place.low, entry);
      const Entry* grad = arrays.grad + n * grid.width() + l * F;
      const Entry* table = arrays.table + level.offset * F;
      Real value[1 << D] = {};
      for (int f = 0; f < F; ++f) {
        const Real g = Storage<Entry>::get(grad[f]);
        UNROLL
        for (int k = 0; k < 1 << D; ++k) {
          value[k] += g * Storage<Entry>::get(table[static_cast<int64_t>(entry[k]) * F + f]);
        }
      }
      if (arrays.direction) {
        add_gradient<Real, D>(place, value, point.v, sum);
      } else {
        add_gradient<Real, D>(place, value, nullptr, sum);
      }
    }
    UNROLL
    for (int d = 0; d < D; ++d) out[n * D + d] = sum[d];
  }
}

template <class Entry>
__global__ void variation_gradient(const __grid_constant__ Grid grid, const __grid_constant__ Arrays<Entry> arrays,
                                   RealOf<Entry> weight, RealOf<Entry>* __restrict__ out) {
  SOMNIUM_FOR_EACH(item, grid.count * grid.active) {
    const int64_t n = item % grid.count;
    variation_at<Entry>(
        grid, grid.level[item / grid.count], arrays.x + n * grid.dims, arrays.table, weight,
        [&](int64_t entry, int f, RealOf<Entry> g) { atomicAdd(out + entry * grid.features + f, g); });
  }
}

// Sets a table-sized output to zero before the atomics add to it.
template <class Real>
void clear(const Grid& grid, Real* out, cudaStream_t stream) {
  const Level& last = grid.level[grid.levels - 1];
  cudaMemsetAsync(out, 0, (last.offset + last.entries) * grid.features * sizeof(Real), stream);
}

#define SOMNIUM_LAUNCH(kernel, items, stream, ...)                                                        \
  if ((items) > 0) {                                                                                      \
    const auto chosen = grid.dims == 2   ? kernel<Entry, 2>                                               \
                        : grid.dims == 3 ? kernel<Entry, 3>                                               \
                        : grid.dims == 4 ? kernel<Entry, 4>                                               \
                                         : kernel<Entry, 5>;                                              \
    chosen<<<blocks_for(items), threads_per_block, 0, stream>>>(__VA_ARGS__);                             \
  }

}  // namespace

template <class Entry>
const char* encode_cuda(const Grid& grid, const Arrays<Entry>& arrays, Entry* out, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  SOMNIUM_LAUNCH(encode, grid.count * grid.levels, queue, grid, arrays, out)
  return launch_error();
}

template <class Entry>
const char* table_gradient_cuda(const Grid& grid, const Arrays<Entry>& arrays, RealOf<Entry>* out, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  clear(grid, out, queue);
  SOMNIUM_LAUNCH(table_gradient, grid.count * grid.active, queue, grid, arrays, out)
  return launch_error();
}

template <class Entry>
const char* input_gradient_cuda(const Grid& grid, const Arrays<Entry>& arrays, RealOf<Entry>* out, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  SOMNIUM_LAUNCH(input_gradient, grid.count, queue, grid, arrays, out)
  return launch_error();
}

template <class Entry>
const char* variation_gradient_cuda(const Grid& grid, const Arrays<Entry>& arrays, double weight, RealOf<Entry>* out,
                                    void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  clear(grid, out, queue);
  const int64_t items = grid.count * grid.active;
  if (items > 0) {
    variation_gradient<Entry><<<blocks_for(items), threads_per_block, 0, queue>>>(
        grid, arrays, static_cast<RealOf<Entry>>(weight), out);
  }
  return launch_error();
}

#define SOMNIUM_INSTANTIATE(Entry)                                                                               \
  template const char* encode_cuda(const Grid&, const Arrays<Entry>&, Entry*, void*);                            \
  template const char* table_gradient_cuda(const Grid&, const Arrays<Entry>&, RealOf<Entry>*, void*);            \
  template const char* input_gradient_cuda(const Grid&, const Arrays<Entry>&, RealOf<Entry>*, void*);            \
  template const char* variation_gradient_cuda(const Grid&, const Arrays<Entry>&, double, RealOf<Entry>*, void*);
SOMNIUM_INSTANTIATE(float)
SOMNIUM_INSTANTIATE(double)
SOMNIUM_INSTANTIATE(Half)

}  // namespace somnium::gridencoder
