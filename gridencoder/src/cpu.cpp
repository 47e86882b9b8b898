// CPU loops: vectors of points for where and how much, then the table, point by point. Outputs per point are split over
// the threads by points; the table's gradient is split by levels, so that it needs no atomics and is the same each time.
#include <vector>

#include "kernel.h"
#include "lanes.h"
#include "parallel.h"

namespace somnium::gridencoder {
namespace {

constexpr int64_t chunk_points = 512;  // few enough for their outputs to stay in cache while the levels pass over them

// What corner by corner code sees of up to one vector of points: [corner][lane].
template <class Real>
struct Corners {
  static constexpr int lanes = Lane<typename LanesOf<Real>::Type>::count;
  uint32_t entry[1 << max_dims][lanes];
  Real weight[1 << max_dims][lanes];
};

template <class Entry, int F>
struct Features {
  typedef RealOf<Entry> Type __attribute__((vector_size(F * sizeof(RealOf<Entry>))));

  static Type get(const Entry* from) {
    Type value = {};
    for (int f = 0; f < F; ++f) value[f] = Storage<Entry>::get(from[f]);
    return value;
  }
  static void put(Entry* to, Type value) {
    for (int f = 0; f < F; ++f) to[f] = Storage<Entry>::put(value[f]);
  }
};

template <class T, int F>
struct PlainFeatures {
  typedef T Type __attribute__((vector_size(F * sizeof(T))));
  static Type get(const T* from) { return load<Type>(from); }
  static void put(T* to, Type value) { store(to, value); }
};
template <int F>
struct Features<float, F> : PlainFeatures<float, F> {};
template <int F>
struct Features<double, F> : PlainFeatures<double, F> {};

// The three ways to touch a level's table, for the corners of a few points. Pointers are untyped, so that the loops
// below need not be compiled once more for each kind of table; `stride` is that of a point's row, in entries.

// out[point] = sum over corners of weight * table[entry]
template <class Entry, int F>
void blend(const Corners<RealOf<Entry>>& corners, int count, int points, const void* untyped_table, void* untyped_out,
           int64_t stride) {
  const auto* table = static_cast<const Entry*>(untyped_table);
  auto* out = static_cast<Entry*>(untyped_out);
  for (int i = 0; i < points; ++i) {
    typename Features<Entry, F>::Type sum = {};
    for (int k = 0; k < count; ++k) {
      sum += corners.weight[k][i] * Features<Entry, F>::get(table + static_cast<int64_t>(corners.entry[k][i]) * F);
    }
    Features<Entry, F>::put(out + i * stride, sum);
  }
}

// table[entry] += weight * grad[point]
template <class Entry, int F>
void spread(const Corners<RealOf<Entry>>& corners, int count, int points, const void* untyped_grad, int64_t stride,
            RealOf<Entry>* table) {
  using Real = RealOf<Entry>;
  const auto* grad = static_cast<const Entry*>(untyped_grad);
  for (int i = 0; i < points; ++i) {
    const auto g = Features<Entry, F>::get(grad + i * stride);
    for (int k = 0; k < count; ++k) {
      Real* to = table + static_cast<int64_t>(corners.entry[k][i]) * F;
      Features<Real, F>::put(to, Features<Real, F>::get(to) + corners.weight[k][i] * g);
    }
  }
}

// weight = <grad[point], table[entry]>: the scalar whose interpolant the gradient in x differentiates
template <class Entry, int F>
void project(Corners<RealOf<Entry>>& corners, int count, int points, const void* untyped_grad, int64_t stride,
             const void* untyped_table) {
  const auto* grad = static_cast<const Entry*>(untyped_grad);
  const auto* table = static_cast<const Entry*>(untyped_table);
  for (int i = 0; i < points; ++i) {
    const auto g = Features<Entry, F>::get(grad + i * stride);
    for (int k = 0; k < count; ++k) {
      const auto product = g * Features<Entry, F>::get(table + static_cast<int64_t>(corners.entry[k][i]) * F);
      RealOf<Entry> sum = 0;
      for (int f = 0; f < F; ++f) sum += product[f];
      corners.weight[k][i] = sum;
    }
  }
}

// Rows of D numbers, transposed to one vector per axis; lanes beyond the last point get `fill`.
template <class V, int D, class Real>
void load_points(const Real* rows, int points, Real fill, V* axes) {
  for (int d = 0; d < D; ++d) {
    axes[d] = V{} + fill;
    for (int i = 0; i < points; ++i) axes[d][i] = rows[i * D + d];
  }
}

template <class Real>
struct Raw {
  const Real* x;
  const Real* direction;
  const char* table;
  const char* grad;
  int64_t bytes;  // of an entry's number

  template <class Entry>
  explicit Raw(const Arrays<Entry>& arrays)
      : x(arrays.x),
        direction(arrays.direction),
        table(reinterpret_cast<const char*>(arrays.table)),
        grad(reinterpret_cast<const char*>(arrays.grad)),
        bytes(sizeof(Entry)) {}
};

template <class Real, int D>
struct Loops {
  using V = typename LanesOf<Real>::Type;
  using Index = typename Lane<V>::Index;
  static constexpr int lanes = Lane<V>::count;
  static constexpr int count = 1 << D;

  struct Group {
    V x[D], v[D];
    int64_t first;
    int points;
  };

  static Group group_at(const Grid& grid, const Raw<Real>& arrays, int64_t first, int64_t end) {
    Group group;
    group.first = first;
    group.points = static_cast<int>(end - first < lanes ? end - first : lanes);
    load_points<V, D>(arrays.x + first * D, group.points, static_cast<Real>(2 * grid.bound), group.x);
    if (arrays.direction) load_points<V, D>(arrays.direction + first * D, group.points, Real(0), group.v);
    return group;
  }

  static Place<V, D> visit(const Grid& grid, const Level& level, const Group& group, Corners<Real>& corners) {
    const auto place = locate<Real, V, D>(grid, level, group.x);
    Index entries[count];
    corner_entries<Index, D>(level, place.low, entries);
    for (int k = 0; k < count; ++k) store(corners.entry[k], entries[k]);
    return place;
  }

  static void weigh(const Place<V, D>& place, const V* v, Corners<Real>& corners) {
    V weights[count];
    if (v) {
      corner_weights<V, D>(place, v, weights);
    } else {
      corner_weights<V, D>(place, nullptr, weights);
    }
    for (int k = 0; k < count; ++k) store(corners.weight[k], weights[k]);
  }

  template <class Body>
  static void for_chunks(const Grid& grid, const Raw<Real>& arrays, const Body& body) {
    const int64_t chunks = (grid.count + chunk_points - 1) / chunk_points;
    parallel_tasks(chunks, [&](int64_t chunk) {
      const int64_t begin = chunk * chunk_points;
      const int64_t end = begin + chunk_points < grid.count ? begin + chunk_points : grid.count;
      Group groups[chunk_points / lanes];
      int used = 0;
      for (int64_t first = begin; first < end; first += lanes) groups[used++] = group_at(grid, arrays, first, end);
      body(groups, used);
    });
  }

  static void encode(const Grid& grid, const Raw<Real>& arrays, decltype(&blend<Real, 1>) blend_corners, char* out) {
    for_chunks(grid, arrays, [&](const Group* groups, int used) {
      Corners<Real> corners;
      for (int l = 0; l < grid.active; ++l) {
        const Level& level = grid.level[l];
        const char* table = arrays.table + level.offset * grid.features * arrays.bytes;
        for (int g = 0; g < used; ++g) {
          const auto place = visit(grid, level, groups[g], corners);
          weigh(place, arrays.direction ? groups[g].v : nullptr, corners);
          char* to = out + (groups[g].first * grid.width() + l * grid.features) * arrays.bytes;
          blend_corners(corners, count, groups[g].points, table, to, grid.width());
        }
      }
      const int64_t unused = (grid.levels - grid.active) * static_cast<int64_t>(grid.features);
      for (int g = 0; g < used && unused; ++g) {
        for (int i = 0; i < groups[g].points; ++i) {
          std::memset(out + ((groups[g].first + i + 1) * grid.width() - unused) * arrays.bytes, 0, unused * arrays.bytes);
        }
      }
    });
  }

  static void input_gradient(const Grid& grid, const Raw<Real>& arrays, decltype(&project<Real, 1>) project_corners,
                             Real* out) {
    for_chunks(grid, arrays, [&](const Group* groups, int used) {
      Corners<Real> corners = {};
      V sums[chunk_points / lanes][D] = {};
      for (int l = 0; l < grid.active; ++l) {
        const Level& level = grid.level[l];
        const char* table = arrays.table + level.offset * grid.features * arrays.bytes;
        for (int g = 0; g < used; ++g) {
          const auto place = visit(grid, level, groups[g], corners);
          const char* grad = arrays.grad + (groups[g].first * grid.width() + l * grid.features) * arrays.bytes;
          project_corners(corners, count, groups[g].points, grad, grid.width(), table);
          V values[count];
          for (int k = 0; k < count; ++k) values[k] = load<V>(corners.weight[k]);
          if (arrays.direction) {
            add_gradient<V, D>(place, values, groups[g].v, sums[g]);
          } else {
            add_gradient<V, D>(place, values, nullptr, sums[g]);
          }
        }
      }
      for (int g = 0; g < used; ++g) {
        for (int i = 0; i < groups[g].points; ++i) {
          for (int d = 0; d < D; ++d) out[(groups[g].first + i) * D + d] = sums[g][d][i];
        }
      }
    });
  }

  // One task per level; on machines with more threads than levels, a few per level, each with a table of its own.
  static void table_gradient(const Grid& grid, const Raw<Real>& arrays, decltype(&spread<Real, 1>) spread_corners, Real* out) {
    int64_t slices = grid.active ? thread_count() / grid.active : 1;
    slices = slices < 1 || grid.count < 4096 ? 1 : slices > 8 ? 8 : slices;
    const int64_t size = grid.level[grid.levels - 1].offset + grid.level[grid.levels - 1].entries;
    std::vector<Real> extra((slices - 1) * size * grid.features);
    parallel_tasks(grid.levels * slices, [&](int64_t task) {
      const int64_t l = task / slices, slice = task % slices;
      const Level& level = grid.level[l];
      Real* table = (slice ? extra.data() + (slice - 1) * size * grid.features : out) + level.offset * grid.features;
      std::memset(table, 0, level.entries * grid.features * sizeof(Real));
      if (l >= grid.active) return;
      const int64_t end = grid.count * (slice + 1) / slices;
      Corners<Real> corners;
      for (int64_t first = grid.count * slice / slices; first < end; first += lanes) {
        const Group group = group_at(grid, arrays, first, end);
        weigh(visit(grid, level, group, corners), arrays.direction ? group.v : nullptr, corners);
        const char* grad = arrays.grad + (first * grid.width() + l * grid.features) * arrays.bytes;
        spread_corners(corners, count, group.points, grad, grid.width(), table);
      }
    });
    if (slices == 1) return;
    parallel_for(size * grid.features, 1 << 14, [&](int64_t begin, int64_t end) {
      for (int64_t slice = 0; slice + 1 < slices; ++slice) {
        const Real* from = extra.data() + slice * size * grid.features;
        for (int64_t i = begin; i < end; ++i) out[i] += from[i];
      }
    });
  }
};

// The function of a table row that fits the number of features.
#define SOMNIUM_BY_FEATURES(function, F)              \
  ((F) == 1   ? function<Entry, 1>                    \
   : (F) == 2 ? function<Entry, 2>                    \
   : (F) == 4 ? function<Entry, 4>                    \
              : function<Entry, 8>)

// Calls the loops for the number of dimensions.
#define SOMNIUM_BY_DIMS(dims, call)                      \
  ((dims) == 2   ? (void)Loops<RealOf<Entry>, 2>::call           \
   : (dims) == 3 ? (void)Loops<RealOf<Entry>, 3>::call           \
   : (dims) == 4 ? (void)Loops<RealOf<Entry>, 4>::call           \
                 : (void)Loops<RealOf<Entry>, 5>::call)

}  // namespace

template <class Entry>
void encode_cpu(const Grid& grid, const Arrays<Entry>& arrays, Entry* out) {
  const auto inner = SOMNIUM_BY_FEATURES(blend, grid.features);
  SOMNIUM_BY_DIMS(grid.dims, encode(grid, Raw<RealOf<Entry>>(arrays), inner, reinterpret_cast<char*>(out)));
}

template <class Entry>
void table_gradient_cpu(const Grid& grid, const Arrays<Entry>& arrays, RealOf<Entry>* out) {
  const auto inner = SOMNIUM_BY_FEATURES(spread, grid.features);
  SOMNIUM_BY_DIMS(grid.dims, table_gradient(grid, Raw<RealOf<Entry>>(arrays), inner, out));
}

template <class Entry>
void input_gradient_cpu(const Grid& grid, const Arrays<Entry>& arrays, RealOf<Entry>* out) {
  const auto inner = SOMNIUM_BY_FEATURES(project, grid.features);
  SOMNIUM_BY_DIMS(grid.dims, input_gradient(grid, Raw<RealOf<Entry>>(arrays), inner, out));
}

template <class Entry>
void variation_gradient_cpu(const Grid& grid, const Arrays<Entry>& arrays, double weight, RealOf<Entry>* out) {
  parallel_tasks(grid.levels, [&](int64_t l) {
    const Level& level = grid.level[l];
    std::memset(out + level.offset * grid.features, 0, level.entries * grid.features * sizeof(*out));
    for (int64_t n = 0; n < grid.count && l < grid.active; ++n) {
      variation_at<Entry>(grid, level, arrays.x + n * grid.dims, arrays.table, static_cast<RealOf<Entry>>(weight),
                          [&](int64_t entry, int f, RealOf<Entry> g) { out[entry * grid.features + f] += g; });
    }
  });
}

#define SOMNIUM_INSTANTIATE(Entry)                                                                 \
  template void encode_cpu(const Grid&, const Arrays<Entry>&, Entry*);                             \
  template void table_gradient_cpu(const Grid&, const Arrays<Entry>&, RealOf<Entry>*);             \
  template void input_gradient_cpu(const Grid&, const Arrays<Entry>&, RealOf<Entry>*);             \
  template void variation_gradient_cpu(const Grid&, const Arrays<Entry>&, double, RealOf<Entry>*);
SOMNIUM_INSTANTIATE(float)
SOMNIUM_INSTANTIATE(double)
SOMNIUM_INSTANTIATE(Half)

}  // namespace somnium::gridencoder
