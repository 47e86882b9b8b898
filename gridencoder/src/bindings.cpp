// Registers somnium_gridencoder's operators; everything a caller can get wrong is checked here.
#include "bindings.h"

#include "kernel.h"

namespace somnium::gridencoder {
namespace {

using Sizes = std::vector<int64_t>;

// No vertex may lead outside a level's rows: a mask below their number sees to it, or rows enough for every vertex.
void check_rows(const int64_t* field, int64_t dims) {
  const int64_t entries = field[1], mask = field[3];
  bool fits = 0 <= mask && mask < entries;
  if (!fits && !field[4] && mask == 0xffffffff) {
    int64_t vertices = 1;
    fits = true;
    for (int64_t d = 0; d < dims && fits; ++d) {
      fits = field[5 + d] == vertices;
      vertices *= field[2];
      fits = fits && vertices <= entries;
    }
  }
  STD_TORCH_CHECK(fits, "a level's vertices must fit into its ", entries, " rows");
}

// levels: offset, entries, resolution, mask, hashed (0 or 1) and one multiplier per axis, for each level in turn.
Grid checked_grid(const Tensor& x, const Sizes& levels, int64_t features, int64_t active, bool smoothstep,
                  bool align_corners, double bound) {
  STD_TORCH_CHECK(x.dim() == 2 && 2 <= x.size(1) && x.size(1) <= max_dims, "x must have shape [*, 2 .. 5]");
  const int64_t dims = x.size(1), fields = 5 + dims, count = levels.size() / fields;
  STD_TORCH_CHECK(count * fields == static_cast<int64_t>(levels.size()) && 1 <= count && count <= max_levels,
                  "levels must hold ", fields, " numbers for each of 1 .. ", max_levels, " levels");
  STD_TORCH_CHECK(features == 1 || features == 2 || features == 4 || features == 8,
                  "the table must have 1, 2, 4 or 8 features per entry, got ", features);
  STD_TORCH_CHECK(0 <= active && active <= count, "active must lie in 0 .. levels, got ", active);
  STD_TORCH_CHECK(bound > 0, "bound must be positive, got ", bound);
  Grid grid = {x.size(0), static_cast<int>(dims), static_cast<int>(count), static_cast<int>(features),
               static_cast<int>(active), smoothstep, align_corners, bound, {}};
  for (int64_t l = 0; l < count; ++l) {
    const int64_t* field = levels.data() + l * fields;
    STD_TORCH_CHECK(field[2] >= 2, "a level needs a resolution of at least 2, got ", field[2]);
    check_rows(field, dims);
    Level& level = grid.level[l];
    level = {field[0], field[1], static_cast<uint32_t>(field[2]), {}, static_cast<uint32_t>(field[3]), field[4] != 0};
    for (int64_t d = 0; d < dims; ++d) level.multiplier[d] = static_cast<uint32_t>(field[5 + d]);
  }
  return grid;
}

int64_t entries_of(const Grid& grid) {
  return grid.level[grid.levels - 1].offset + grid.level[grid.levels - 1].entries;
}

// float16 and float32 tables go with float32 points, float64 with float64.
ScalarType real_of(ScalarType entry) {
  STD_TORCH_CHECK(entry == ScalarType::Half || entry == ScalarType::Float || entry == ScalarType::Double,
                  "the table must be float16, float32 or float64");
  return entry == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_points(const Grid& grid, const Tensor& x, const std::optional<Tensor>& direction, ScalarType entry) {
  check(x, "x", x, real_of(entry), {any_size, any_size});
  if (direction) check(*direction, "direction", x, real_of(entry), {grid.count, grid.dims});
}

template <class Entry>
Arrays<Entry> arrays_of(const Tensor& x, const std::optional<Tensor>& direction, const Tensor* table,
                        const Tensor* grad) {
  using Real = RealOf<Entry>;
  return {read<Real>(x), read<Real>(direction), table ? read<Entry>(*table) : nullptr,
          grad ? read<Entry>(*grad) : nullptr};
}

// Calls body(Entry{}) for the C++ type of the table's numbers.
template <class Body>
void by_type(ScalarType entry, const Body& body) {
  if (entry == ScalarType::Half) return body(Half{});
  if (entry == ScalarType::Double) return body(double{});
  return body(float{});
}

#ifdef USE_CUDA
#define SOMNIUM_RUN(launcher, home, ...)                                             \
  if ((home).is_cuda()) {                                                            \
    const Launch launch(home);                                                       \
    return check_launch(launcher##_cuda(__VA_ARGS__, launch.stream()));              \
  }                                                                                  \
  launcher##_cpu(__VA_ARGS__)
#else
#define SOMNIUM_RUN(launcher, home, ...) launcher##_cpu(__VA_ARGS__)
#endif

Tensor encode(const Tensor& x, const Tensor& table, const std::optional<Tensor>& direction, Sizes levels,
              int64_t active, bool smoothstep, bool align_corners, double bound) {
  STD_TORCH_CHECK(table.dim() == 2, "table must have shape [*, *]");
  const Grid grid = checked_grid(x, levels, table.size(1), active, smoothstep, align_corners, bound);
  const ScalarType entry = table.scalar_type();
  check_points(grid, x, direction, entry);
  check(table, "table", x, entry, {entries_of(grid), grid.features});
  Tensor out = new_output(x, {grid.count, grid.width()}, entry);
  by_type(entry, [&](auto type) {
    using Entry = decltype(type);
    SOMNIUM_RUN(encode, x, grid, arrays_of<Entry>(x, direction, &table, nullptr), write<Entry>(out));
  });
  return out;
}

Tensor table_gradient(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& direction, Sizes levels,
                      int64_t features, int64_t active, bool smoothstep, bool align_corners, double bound) {
  const Grid grid = checked_grid(x, levels, features, active, smoothstep, align_corners, bound);
  const ScalarType entry = grad.scalar_type();
  check_points(grid, x, direction, entry);
  check(grad, "grad", x, entry, {grid.count, grid.width()});
  Tensor out = new_output(x, {entries_of(grid), grid.features}, real_of(entry));
  by_type(entry, [&](auto type) {
    using Entry = decltype(type);
    SOMNIUM_RUN(table_gradient, x, grid, arrays_of<Entry>(x, direction, nullptr, &grad), write<RealOf<Entry>>(out));
  });
  return out;
}

Tensor input_gradient(const Tensor& grad, const Tensor& x, const Tensor& table, const std::optional<Tensor>& direction,
                      Sizes levels, int64_t active, bool smoothstep, bool align_corners, double bound) {
  STD_TORCH_CHECK(table.dim() == 2, "table must have shape [*, *]");
  const Grid grid = checked_grid(x, levels, table.size(1), active, smoothstep, align_corners, bound);
  const ScalarType entry = table.scalar_type();
  check_points(grid, x, direction, entry);
  check(table, "table", x, entry, {entries_of(grid), grid.features});
  check(grad, "grad", x, entry, {grid.count, grid.width()});
  Tensor out = new_output(x, {grid.count, grid.dims}, real_of(entry));
  by_type(entry, [&](auto type) {
    using Entry = decltype(type);
    SOMNIUM_RUN(input_gradient, x, grid, arrays_of<Entry>(x, direction, &table, &grad), write<RealOf<Entry>>(out));
  });
  return out;
}

Tensor variation_gradient(const Tensor& x, const Tensor& table, Sizes levels, int64_t active, bool align_corners,
                          double bound, double weight) {
  STD_TORCH_CHECK(table.dim() == 2, "table must have shape [*, *]");
  const Grid grid = checked_grid(x, levels, table.size(1), active, false, align_corners, bound);
  const ScalarType entry = table.scalar_type();
  check_points(grid, x, std::nullopt, entry);
  check(table, "table", x, entry, {entries_of(grid), grid.features});
  Tensor out = new_output(x, {entries_of(grid), grid.features}, real_of(entry));
  by_type(entry, [&](auto type) {
    using Entry = decltype(type);
    SOMNIUM_RUN(variation_gradient, x, grid, arrays_of<Entry>(x, std::nullopt, &table, nullptr), weight,
                write<RealOf<Entry>>(out));
  });
  return out;
}

}  // namespace
}  // namespace somnium::gridencoder

#define SOMNIUM_OPERATORS(library)                                                          \
  library.impl("encode", TORCH_BOX(&somnium::gridencoder::encode));                         \
  library.impl("table_gradient", TORCH_BOX(&somnium::gridencoder::table_gradient));         \
  library.impl("input_gradient", TORCH_BOX(&somnium::gridencoder::input_gradient));         \
  library.impl("variation_gradient", TORCH_BOX(&somnium::gridencoder::variation_gradient));

STABLE_TORCH_LIBRARY(somnium_gridencoder, library) {
  library.def(
      "encode(Tensor x, Tensor table, Tensor? direction, int[] levels, int active, bool smoothstep, "
      "bool align_corners, float bound) -> Tensor");
  library.def(
      "table_gradient(Tensor grad, Tensor x, Tensor? direction, int[] levels, int features, int active, "
      "bool smoothstep, bool align_corners, float bound) -> Tensor");
  library.def(
      "input_gradient(Tensor grad, Tensor x, Tensor table, Tensor? direction, int[] levels, int active, "
      "bool smoothstep, bool align_corners, float bound) -> Tensor");
  library.def(
      "variation_gradient(Tensor x, Tensor table, int[] levels, int active, bool align_corners, float bound, "
      "float weight) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(somnium_gridencoder, CPU, library) { SOMNIUM_OPERATORS(library) }

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(somnium_gridencoder, CUDA, library) { SOMNIUM_OPERATORS(library) }
#endif
