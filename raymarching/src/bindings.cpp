// Registers somnium_raymarching::*; everything a caller can get wrong is checked here.
#include "bindings.h"

#include <tuple>

#include "kernel.h"

namespace somnium::raymarching {
namespace {

using torch::stable::new_empty;
using torch::stable::new_zeros;

template <class Body>
void run(const Tensor& home, const Body& body) {
#ifdef USE_CUDA
  if (home.is_cuda()) {
    const Launch launch(home);
    return check_launch(run_cuda(body, launch.stream()));
  }
#endif
  run_cpu(body);
}

std::tuple<Tensor, Tensor> near_far_op(const Tensor& rays_o, const Tensor& rays_d, const Tensor& aabb, double min_near) {
  const int64_t count = rays_o.dim() ? rays_o.size(0) : 0;
  const ScalarType type = rays_o.scalar_type();
  check(rays_o, "rays_o", rays_o, type, {any_size, 3});
  check(rays_d, "rays_d", rays_o, type, {count, 3});
  check(aabb, "aabb", rays_o, type, {6});
  Tensor near = new_empty(rays_o, {count}), far = new_empty(rays_o, {count});
  dispatch(rays_o, "rays_o", [&](auto real) {
    using T = decltype(real);
    run(rays_o, NearFar<T>{count, read<T>(rays_o), read<T>(rays_d), read<T>(aabb), static_cast<T>(min_near),
                           write<T>(near), write<T>(far)});
  });
  return {near, far};
}

Tensor morton3D(const Tensor& coords) {
  check(coords, "coords", coords, ScalarType::Int, {any_size, 3});
  Tensor indices = new_empty(coords, {coords.size(0)});
  run(coords, Morton{coords.size(0), read<int32_t>(coords), write<int32_t>(indices)});
  return indices;
}

Tensor morton3D_invert(const Tensor& indices) {
  check(indices, "indices", indices, ScalarType::Int, {any_size});
  Tensor coords = new_empty(indices, {indices.size(0), 3});
  run(indices, MortonInvert{indices.size(0), read<int32_t>(indices), write<int32_t>(coords)});
  return coords;
}

Tensor packbits(const Tensor& grid, double thresh) {
  check(grid, "grid", grid, grid.scalar_type(), {any_size, any_size});
  STD_TORCH_CHECK(grid.size(1) % 8 == 0, "grid must have a multiple of 8 cells, got ", grid.size(1));
  const int64_t count = grid.numel() / 8;
  Tensor bytes = new_empty(grid, {count}, ScalarType::Byte);
  dispatch(grid, "grid", [&](auto real) {
    using T = decltype(real);
    run(grid, Pack<T>{count, read<T>(grid), static_cast<T>(thresh), write<uint8_t>(bytes)});
  });
  return bytes;
}

// The marcher's arguments, as they arrive.
struct March {
  const Tensor &rays_o, &rays_d, &near, &far;
  const std::optional<Tensor>&noise, &cursor;
  const Tensor& bitfield;
  double bound;
  int64_t cascades, size;
  double dt_gamma;
  int64_t max_steps, budget;

  int64_t count() const { return rays_o.size(0); }

  void checked() const {
    const ScalarType type = rays_o.scalar_type();
    check(rays_o, "rays_o", rays_o, type, {any_size, 3});
    check(rays_d, "rays_d", rays_o, type, {count(), 3});
    check(near, "near", rays_o, type, {count()});
    check(far, "far", rays_o, type, {count()});
    if (noise) check(*noise, "noise", rays_o, type, {count()});
    if (cursor) check(*cursor, "cursor", rays_o, ScalarType::Int, {count(), 2});
    STD_TORCH_CHECK(size >= 8 && size <= 1024 && (size & (size - 1)) == 0,
                    "grid_size must be a power of two in 8 .. 1024, got ", size);
    STD_TORCH_CHECK(cascades >= 1 && cascades <= max_cascades, "cascades must lie in 1 .. ", max_cascades, ", got ",
                    cascades);
    STD_TORCH_CHECK(bound > 0, "bound must be positive, got ", bound);
    STD_TORCH_CHECK(dt_gamma >= 0, "dt_gamma must not be negative, got ", dt_gamma);
    STD_TORCH_CHECK(max_steps >= 1 && max_steps < (1 << 30), "max_steps must be positive, got ", max_steps);
    STD_TORCH_CHECK(budget >= 0 && budget < (1 << 30), "budget must not be negative, got ", budget);
    check(bitfield, "bitfield", rays_o, ScalarType::Byte, {cascades * size * size * size / 8});
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(bitfield.const_data_ptr()) % 8 == 0,
                    "bitfield must start at a multiple of 8 bytes: clone it");
  }

  int64_t words_per_cascade() const { return size * size * size / 64; }
  int64_t bricks_per_cascade() const { return size >= 32 ? words_per_cascade() / 512 : 1; }

  Tensor make_bricks() const {
    const int64_t count = cascades * bricks_per_cascade();
    Tensor bricks = new_empty(bitfield, {count}, ScalarType::Long);
    run(bitfield, Bricks{count, words_per_cascade() / bricks_per_cascade() / 8, read<uint64_t>(bitfield),
                         write<uint64_t>(bricks)});
    return bricks;
  }

  template <class T>
  Rays<T> rays() const {
    return {read<T>(rays_o), read<T>(rays_d),       read<T>(near),                read<T>(far),
            read<T>(noise),  read<int32_t>(cursor), static_cast<int32_t>(budget), static_cast<int32_t>(max_steps)};
  }

  template <class T>
  Grid<T> grid(const Tensor& bricks) const {
    Grid<T> grid = {};
    grid.words = read<uint64_t>(bitfield);
    grid.bricks = read<uint64_t>(bricks);
    grid.cascades = static_cast<int32_t>(cascades);
    grid.size = static_cast<int32_t>(size);
    grid.words_per_cascade = words_per_cascade();
    grid.bricks_per_cascade = bricks_per_cascade();
    grid.bound = static_cast<T>(bound);
    for (int level = 0; level < cascades; ++level) {
      const double box = std::fmin(std::ldexp(1.0, level), bound);
      grid.box[level] = static_cast<T>(box);
      grid.cell[level] = static_cast<T>(2 * box / size);
      grid.per_cell[level] = static_cast<T>(size / (2 * box));
    }
    return grid;
  }

  template <class T>
  Lattice<T> lattice() const {
    Lattice<T> lattice = {};
    const double dt_min = 2 * std::sqrt(3.0) / max_steps;
    const double dt_max = std::fmax(dt_min, 2 * std::sqrt(3.0) * bound / size);
    lattice.dt_min = static_cast<T>(dt_min);
    lattice.dt_max = static_cast<T>(dt_max);
    lattice.per_dt = static_cast<T>(1 / dt_min);
    lattice.gamma = static_cast<T>(dt_gamma);
    if (dt_gamma > 0) {
      const double rate = std::log1p(dt_gamma), growth = std::log(dt_max / dt_min) / rate;
      lattice.rate = static_cast<T>(rate);
      lattice.t_low = static_cast<T>(dt_min / dt_gamma);
      lattice.t_high = static_cast<T>(dt_max / dt_gamma);
      lattice.n_low = static_cast<T>(1 / dt_gamma);
      lattice.n_high = static_cast<T>(1 / dt_gamma + growth);
    }
    return lattice;
  }
};

std::tuple<Tensor, Tensor, Tensor> march_count(const Tensor& rays_o, const Tensor& rays_d, const Tensor& near,
                                               const Tensor& far, const std::optional<Tensor>& noise,
                                               const std::optional<Tensor>& cursor, const Tensor& bitfield,
                                               double bound, int64_t cascades, int64_t size, double dt_gamma,
                                               int64_t max_steps, int64_t budget) {
  const March march = {rays_o,   rays_d, near,     far,       noise, cursor, bitfield, bound,
                       cascades, size,   dt_gamma, max_steps, budget};
  march.checked();
  const Tensor bricks = march.make_bricks();
  Tensor counts = new_empty(rays_o, {march.count()}, ScalarType::Int);
  Tensor first = new_empty(rays_o, {march.count()}, ScalarType::Int);
  Tensor next = new_empty(rays_o, {march.count(), 2}, ScalarType::Int);
  dispatch(rays_o, "rays_o", [&](auto real) {
    using T = decltype(real);
    run(rays_o, Count<T>{march.count(), march.rays<T>(), march.grid<T>(bricks), march.lattice<T>(),
                         write<int32_t>(counts), write<int32_t>(first), write<int32_t>(next)});
  });
  return {counts, first, next};
}

std::tuple<Tensor, Tensor, Tensor> march_write(const Tensor& rays_o, const Tensor& rays_d, const Tensor& near,
                                               const Tensor& far, const std::optional<Tensor>& noise,
                                               const Tensor& bitfield, double bound, int64_t cascades, int64_t size,
                                               double dt_gamma, int64_t max_steps, const Tensor& first,
                                               const Tensor& rays, int64_t total) {
  const std::optional<Tensor> none;
  const March march = {rays_o,   rays_d, near,     far,       noise, none, bitfield, bound,
                       cascades, size,   dt_gamma, max_steps, 0};
  march.checked();
  check(first, "first", rays_o, ScalarType::Int, {march.count()});
  check(rays, "rays", rays_o, ScalarType::Int, {march.count(), 2});
  const Tensor bricks = march.make_bricks();
  Tensor xyz = new_empty(rays_o, {total, 3}), direction = new_empty(rays_o, {total, 3});
  Tensor t = new_empty(rays_o, {total, 2});
  dispatch(rays_o, "rays_o", [&](auto real) {
    using T = decltype(real);
    run(rays_o, Write<T>{march.count(), march.rays<T>(), march.grid<T>(bricks), march.lattice<T>(),
                         read<int32_t>(rays), read<int32_t>(first), write<T>(xyz), write<T>(direction), write<T>(t)});
  });
  return {xyz, direction, t};
}

// Calls body with the number of channels as a constant where there is an instance for it.
template <class Body>
void with_channels(int64_t channels, const Body& body) {
  switch (channels) {
    case 1: return body(std::integral_constant<int, 1>());
    case 3: return body(std::integral_constant<int, 3>());
    case 4: return body(std::integral_constant<int, 4>());
    default: return body(std::integral_constant<int, 0>());
  }
}

void check_samples(const Tensor& sigma, const Tensor& rgb, const Tensor& t, const Tensor& rays) {
  const int64_t samples = sigma.dim() ? sigma.size(0) : 0;
  check(sigma, "sigma", sigma, sigma.scalar_type(), {any_size});
  check(rgb, "rgb", sigma, sigma.scalar_type(), {samples, any_size});
  check(t, "t", sigma, sigma.scalar_type(), {samples, 2});
  check(rays, "rays", sigma, ScalarType::Int, {any_size, 2});
  if (sigma.is_cuda()) return;  // reading `rays` would make the host wait; there, a bad ray is left out
  int64_t sum = 0;
  const int32_t* table = read<int32_t>(rays);
  for (int64_t i = 0; i < rays.size(0); ++i) {
    STD_TORCH_CHECK(fits(table, i, samples), "rays: ray ", i, " wants samples ", table[2 * i], " to ",
                    int64_t(table[2 * i]) + table[2 * i + 1], " of ", samples);
    sum += table[2 * i + 1];
  }
  STD_TORCH_CHECK(sum == samples, "rays must have every sample in one ray: they count ", sum, " of ", samples);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> composite_train(const Tensor& sigma, const Tensor& rgb,
                                                                   const Tensor& t, const Tensor& rays,
                                                                   double T_thresh) {
  check_samples(sigma, rgb, t, rays);
  const int64_t samples = sigma.size(0), channels = rgb.size(1), count = rays.size(0);
  Tensor weights = new_empty(sigma, {samples}), behind = new_empty(sigma, {samples});
  Tensor alpha = new_zeros(sigma, {count}), depth = new_zeros(sigma, {count});
  Tensor image = new_zeros(sigma, {count, channels});
  dispatch(sigma, "sigma", [&](auto real) {
    using T = decltype(real);
    with_channels(channels, [&](auto known) {
      run(sigma, Composite<T, known()>{count, samples, channels, read<T>(sigma), read<T>(rgb), read<T>(t),
                                       read<int32_t>(rays), static_cast<T>(T_thresh), write<T>(weights),
                                       write<T>(behind), nullptr, write<T>(alpha), write<T>(depth), write<T>(image)});
    });
  });
  return {weights, behind, alpha, depth, image};
}

std::tuple<Tensor, Tensor> composite_backward_op(const Tensor& rgb, const Tensor& t, const Tensor& rays,
                                              const Tensor& weights, const Tensor& behind,
                                              const std::optional<Tensor>& grad_weights,
                                              const std::optional<Tensor>& grad_alpha,
                                              const std::optional<Tensor>& grad_depth,
                                              const std::optional<Tensor>& grad_image) {
  check_samples(weights, rgb, t, rays);
  const ScalarType type = weights.scalar_type();
  const int64_t samples = weights.size(0), channels = rgb.size(1), count = rays.size(0);
  check(behind, "behind", weights, type, {samples});
  if (grad_weights) check(*grad_weights, "grad_weights", weights, type, {samples});
  if (grad_alpha) check(*grad_alpha, "grad_alpha", weights, type, {count});
  if (grad_depth) check(*grad_depth, "grad_depth", weights, type, {count});
  if (grad_image) check(*grad_image, "grad_image", weights, type, {count, channels});
  Tensor grad_sigma = new_empty(weights, {samples}), grad_rgb = new_empty(weights, {samples, channels});
  dispatch(weights, "weights", [&](auto real) {
    using T = decltype(real);
    with_channels(channels, [&](auto known) {
      run(weights,
          CompositeBackward<T, known()>{count, samples, channels, read<T>(rgb), read<T>(t), read<T>(weights),
                                        read<T>(behind), read<int32_t>(rays), read<T>(grad_weights),
                                        read<T>(grad_alpha), read<T>(grad_depth), read<T>(grad_image),
                                        write<T>(grad_sigma), write<T>(grad_rgb)});
    });
  });
  return {grad_sigma, grad_rgb};
}

void composite_more(const Tensor& sigma, const Tensor& rgb, const Tensor& t, const Tensor& rays, Tensor transmittance,
                    Tensor alpha, Tensor depth, Tensor image, double T_thresh) {
  check_samples(sigma, rgb, t, rays);
  const ScalarType type = sigma.scalar_type();
  const int64_t samples = sigma.size(0), channels = rgb.size(1), count = rays.size(0);
  check(transmittance, "transmittance", sigma, type, {count});
  check(alpha, "alpha", sigma, type, {count});
  check(depth, "depth", sigma, type, {count});
  check(image, "image", sigma, type, {count, channels});
  dispatch(sigma, "sigma", [&](auto real) {
    using T = decltype(real);
    with_channels(channels, [&](auto known) {
      run(sigma, Composite<T, known()>{count, samples, channels, read<T>(sigma), read<T>(rgb), read<T>(t),
                                       read<int32_t>(rays), static_cast<T>(T_thresh), nullptr, nullptr,
                                       write<T>(transmittance), write<T>(alpha), write<T>(depth), write<T>(image)});
    });
  });
}

}  // namespace
}  // namespace somnium::raymarching

STABLE_TORCH_LIBRARY(somnium_raymarching, library) {
  library.def("near_far(Tensor rays_o, Tensor rays_d, Tensor aabb, float min_near) -> (Tensor, Tensor)");
  library.def("morton3D(Tensor coords) -> Tensor");
  library.def("morton3D_invert(Tensor indices) -> Tensor");
  library.def("packbits(Tensor grid, float thresh) -> Tensor");
  library.def(
      "march_count(Tensor rays_o, Tensor rays_d, Tensor near, Tensor far, Tensor? noise, Tensor? cursor, "
      "Tensor bitfield, float bound, int cascades, int size, float dt_gamma, int max_steps, int budget) "
      "-> (Tensor, Tensor, Tensor)");
  library.def(
      "march_write(Tensor rays_o, Tensor rays_d, Tensor near, Tensor far, Tensor? noise, Tensor bitfield, "
      "float bound, int cascades, int size, float dt_gamma, int max_steps, Tensor first, Tensor rays, int total) "
      "-> (Tensor, Tensor, Tensor)");
  library.def(
      "composite_train(Tensor sigma, Tensor rgb, Tensor t, Tensor rays, float T_thresh) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "composite_backward(Tensor rgb, Tensor t, Tensor rays, Tensor weights, Tensor behind, Tensor? grad_weights, "
      "Tensor? grad_alpha, Tensor? grad_depth, Tensor? grad_image) -> (Tensor, Tensor)");
  library.def(
      "composite_more(Tensor sigma, Tensor rgb, Tensor t, Tensor rays, Tensor(a!) transmittance, Tensor(b!) alpha, "
      "Tensor(c!) depth, Tensor(d!) image, float T_thresh) -> ()");
}

#define SOMNIUM_RAYMARCHING_IMPL(library)                                                     \
  library.impl("near_far", TORCH_BOX(&somnium::raymarching::near_far_op));                       \
  library.impl("morton3D", TORCH_BOX(&somnium::raymarching::morton3D));                       \
  library.impl("morton3D_invert", TORCH_BOX(&somnium::raymarching::morton3D_invert));         \
  library.impl("packbits", TORCH_BOX(&somnium::raymarching::packbits));                       \
  library.impl("march_count", TORCH_BOX(&somnium::raymarching::march_count));                 \
  library.impl("march_write", TORCH_BOX(&somnium::raymarching::march_write));                 \
  library.impl("composite_train", TORCH_BOX(&somnium::raymarching::composite_train));         \
  library.impl("composite_backward", TORCH_BOX(&somnium::raymarching::composite_backward_op));   \
  library.impl("composite_more", TORCH_BOX(&somnium::raymarching::composite_more))

STABLE_TORCH_LIBRARY_IMPL(somnium_raymarching, CPU, library) { SOMNIUM_RAYMARCHING_IMPL(library); }
#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(somnium_raymarching, CUDA, library) { SOMNIUM_RAYMARCHING_IMPL(library); }
#endif
