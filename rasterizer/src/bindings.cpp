// Registers somnium_rasterizer::*; everything a caller can get wrong is checked here.
#include "bindings.h"

#include <tuple>

#include "kernel.h"

namespace somnium::rasterizer {
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

template <class Body>
void add(const Tensor& home, const Body& body) {
#ifdef USE_CUDA
  if (home.is_cuda()) {
    const Launch launch(home);
    return check_launch(add_cuda(body, launch.stream()));
  }
#endif
  add_cpu(body);
}

int64_t size_of(const Tensor& tensor, int64_t axis) { return axis < tensor.dim() ? tensor.size(axis) : 0; }

template <class T>
Mesh<T> mesh_of(const Tensor& positions, const Tensor& faces, int64_t height, int64_t width) {
  return {read<T>(positions),        read<int32_t>(faces),         size_of(positions, 1), size_of(faces, 0),
          static_cast<int32_t>(height), static_cast<int32_t>(width)};
}

void check_mesh(const Tensor& positions, const Tensor& faces, int64_t height, int64_t width) {
  const ScalarType type = positions.scalar_type();
  check(positions, "positions", positions, type, {any_size, any_size, 4});
  check(faces, "faces", positions, ScalarType::Int, {any_size, 3});
  STD_TORCH_CHECK(positions.size(1) < (int64_t(1) << 31), "too many vertices");
  // A face's number must be exact where it stands in the raster.
  STD_TORCH_CHECK(faces.size(0) < (type == ScalarType::Double ? int64_t(1) << 29 : int64_t(1) << 24), "too many faces");
  STD_TORCH_CHECK(height >= 0 && height <= 32768 && width >= 0 && width <= 32768,
                  "height and width must lie in 0 .. 32768, got ", height, " and ", width);
}

std::tuple<Tensor, Tensor> rasterize(const Tensor& positions, const Tensor& faces, int64_t height, int64_t width,
                                     bool derivatives) {
  check_mesh(positions, faces, height, width);
  const int64_t views = positions.size(0);
  Tensor raster = new_output(positions, {views, height, width, 4}, positions.scalar_type());
  Tensor slopes = new_output(positions, {derivatives ? views : 0, height, width, 4}, positions.scalar_type());
  if (raster.numel() == 0) return {raster, slopes};
  dispatch(positions, "positions", [&](auto real) {
    using T = decltype(real);
    const Mesh<T> mesh = mesh_of<T>(positions, faces, height, width);
    T* second = derivatives ? write<T>(slopes) : nullptr;
#ifdef USE_CUDA
    if (positions.is_cuda()) {
      Tensor nearest = new_empty(positions, {views, height, width}, ScalarType::Long);
      const Launch launch(positions);
      return check_launch(
          rasterize_cuda(mesh, views, write<uint64_t>(nearest), write<T>(raster), second, launch.stream()));
    }
#endif
    rasterize_cpu(mesh, views, write<T>(raster), second);
  });
  return {raster, slopes};
}

Tensor rasterize_backward(const Tensor& positions, const Tensor& faces, const Tensor& raster, const Tensor& grad) {
  const int64_t views = size_of(positions, 0), height = size_of(raster, 1), width = size_of(raster, 2);
  check_mesh(positions, faces, height, width);
  check(raster, "raster", positions, positions.scalar_type(), {views, height, width, 4});
  check(grad, "grad", positions, positions.scalar_type(), {views, height, width, 4});
  Tensor out = new_zeros(positions, {views, positions.size(1), 4});
  dispatch(positions, "positions", [&](auto real) {
    using T = decltype(real);
    const Mesh<T> mesh = mesh_of<T>(positions, faces, height, width);
    add(positions, RasterizeGradient<T>{views * height * width, mesh, read<T>(raster), read<T>(grad),
                                        {write<T>(out), views, views * mesh.vertices, 4}});
  });
  return out;
}

void check_attributes(const Tensor& attributes, const Tensor& raster, const Tensor& faces) {
  check(raster, "raster", raster, raster.scalar_type(), {any_size, any_size, any_size, 4});
  check(faces, "faces", raster, ScalarType::Int, {any_size, 3});
  check(attributes, "attributes", raster, raster.scalar_type(), {any_size, any_size, any_size});
  STD_TORCH_CHECK(attributes.size(0) == 1 || attributes.size(0) == raster.size(0), "attributes of ",
                  attributes.size(0), " views do not fit to a raster of ", raster.size(0));
}

template <class T>
Attributes<T> attributes_of(const Tensor& attributes, const Tensor& raster, const Tensor& faces) {
  return {read<T>(raster),    read<int32_t>(faces),              faces.size(0),
          attributes.size(1), attributes.size(2),                raster.size(1) * raster.size(2),
          attributes.size(0) == 1};
}

int64_t pixels_of(const Tensor& raster) { return raster.size(0) * raster.size(1) * raster.size(2); }

std::tuple<Tensor, Tensor> interpolate(const Tensor& attributes, const Tensor& raster, const Tensor& faces,
                                       const std::optional<Tensor>& raster_db) {
  check_attributes(attributes, raster, faces);
  const int64_t B = raster.size(0), H = raster.size(1), W = raster.size(2), C = attributes.size(2);
  if (raster_db) check(*raster_db, "raster_db", raster, raster.scalar_type(), {B, H, W, 4});
  Tensor out = new_output(raster, {B, H, W, C}, raster.scalar_type());
  Tensor slopes = new_output(raster, {raster_db ? B : 0, H, W, 2 * C}, raster.scalar_type());
  dispatch(raster, "raster", [&](auto real) {
    using T = decltype(real);
    run(raster, Interpolate<T>{pixels_of(raster), attributes_of<T>(attributes, raster, faces), read<T>(attributes),
                               read<T>(raster_db), write<T>(out), write<T>(slopes)});
  });
  return {out, slopes};
}

Tensor interpolate_backward(const Tensor& attributes, const Tensor& raster, const Tensor& faces, const Tensor& grad) {
  check_attributes(attributes, raster, faces);
  check(grad, "grad", raster, raster.scalar_type(),
        {raster.size(0), raster.size(1), raster.size(2), attributes.size(2)});
  Tensor out = new_zeros(attributes, {attributes.size(0), attributes.size(1), attributes.size(2)});
  dispatch(raster, "raster", [&](auto real) {
    using T = decltype(real);
    const Attributes<T> from = attributes_of<T>(attributes, raster, faces);
    add(raster, InterpolateGradient<T>{pixels_of(raster), from, read<T>(grad),
                                       {write<T>(out), attributes.size(0), attributes.size(0) * from.vertices,
                                        from.channels}});
  });
  return out;
}

Tensor interpolate_raster_backward(const Tensor& attributes, const Tensor& raster, const Tensor& faces,
                                   const Tensor& grad) {
  check_attributes(attributes, raster, faces);
  check(grad, "grad", raster, raster.scalar_type(),
        {raster.size(0), raster.size(1), raster.size(2), attributes.size(2)});
  Tensor out = new_output(raster, {raster.size(0), raster.size(1), raster.size(2), 4}, raster.scalar_type());
  dispatch(raster, "raster", [&](auto real) {
    using T = decltype(real);
    run(raster, InterpolateRasterGradient<T>{pixels_of(raster), attributes_of<T>(attributes, raster, faces),
                                             read<T>(attributes), read<T>(grad), write<T>(out)});
  });
  return out;
}

void check_picture(const Tensor& colour, const char* name, const Tensor& raster) {
  check(colour, name, raster, raster.scalar_type(), {raster.size(0), raster.size(1), raster.size(2), any_size});
}

std::tuple<Tensor, Tensor, Tensor> antialias(const Tensor& colour, const Tensor& raster, const Tensor& positions,
                                             const Tensor& faces, const Tensor& topology) {
  const int64_t views = size_of(positions, 0), height = size_of(raster, 1), width = size_of(raster, 2);
  const ScalarType type = positions.scalar_type();
  check_mesh(positions, faces, height, width);
  check(raster, "raster", positions, type, {views, height, width, 4});
  check_picture(colour, "colour", raster);
  check(topology, "topology", positions, ScalarType::Int, {faces.size(0), 3});
  const int64_t vertices = positions.size(1), channels = colour.size(3), pixels = pixels_of(raster);
  Tensor out = new_output(colour, {views, height, width, channels}, type);
  Tensor blends = new_output(colour, {views, height, width, 2}, type);
  Tensor edges = new_output(colour, {views, height, width, 2}, ScalarType::Int);
  Tensor places = new_empty(positions, {views * vertices, 2}, ScalarType::Double);
  dispatch(positions, "positions", [&](auto real) {
    using T = decltype(real);
    const Mesh<T> mesh = mesh_of<T>(positions, faces, height, width);
    run(positions, Project<T>{views * vertices, mesh, write<double>(places)});
    run(positions, Silhouettes<T>{pixels, read<T>(raster), read<double>(places), read<int32_t>(faces),
                                  read<int32_t>(topology), faces.size(0), vertices, mesh.height, mesh.width,
                                  write<T>(blends), write<int32_t>(edges)});
    run(positions,
        Blend<T>{pixels, read<T>(colour), read<T>(blends), channels, mesh.height, mesh.width, write<T>(out)});
  });
  return {out, blends, edges};
}

Tensor antialias_colour_backward(const Tensor& blends, const Tensor& grad) {
  check(grad, "grad", blends, blends.scalar_type(), {any_size, any_size, any_size, any_size});
  const int64_t B = grad.size(0), H = grad.size(1), W = grad.size(2), C = grad.size(3);
  check(blends, "blends", blends, blends.scalar_type(), {B, H, W, 2});
  Tensor out = new_output(grad, {B, H, W, C}, grad.scalar_type());
  dispatch(grad, "grad", [&](auto real) {
    using T = decltype(real);
    run(grad, BlendGradient<T>{B * H * W, read<T>(grad), read<T>(blends), C, static_cast<int32_t>(H),
                               static_cast<int32_t>(W), write<T>(out)});
  });
  return out;
}

Tensor antialias_backward(const Tensor& colour, const Tensor& positions, const Tensor& faces, const Tensor& blends,
                          const Tensor& edges, const Tensor& grad) {
  const ScalarType type = positions.scalar_type();
  const int64_t views = size_of(positions, 0), height = size_of(colour, 1), width = size_of(colour, 2);
  check_mesh(positions, faces, height, width);
  check(colour, "colour", positions, type, {views, height, width, any_size});
  check(grad, "grad", positions, type, {views, height, width, colour.size(3)});
  check(blends, "blends", positions, type, {views, height, width, 2});
  check(edges, "edges", positions, ScalarType::Int, {views, height, width, 2});
  Tensor out = new_zeros(positions, {views, positions.size(1), 4});
  dispatch(positions, "positions", [&](auto real) {
    using T = decltype(real);
    const Mesh<T> mesh = mesh_of<T>(positions, faces, height, width);
    add(positions, EdgeGradient<T>{views * height * width, mesh, read<T>(colour), read<T>(grad), read<T>(blends),
                                   read<int32_t>(edges), colour.size(3),
                                   {write<T>(out), views, views * mesh.vertices, 4}});
  });
  return out;
}

Tensor edges_of(const Tensor& faces) {
  check(faces, "faces", faces, ScalarType::Int, {any_size, 3});
  Tensor ring = new_empty(faces, {faces.size(0), 3});
  edges_cpu(read<int32_t>(faces), faces.size(0), write<int32_t>(ring));
  return ring;
}

using Sizes = std::vector<int64_t>;

// sizes: height and width of every level, the largest first.
template <class T>
Sampler<T> sampler_of(const Tensor& chain, const Sizes& sizes, const Tensor& uv, const std::optional<Tensor>& lod,
                      bool clamp) {
  const ScalarType type = uv.scalar_type();
  check(uv, "uv", uv, type, {any_size, any_size, any_size, 2});
  if (lod) check(*lod, "lod", uv, type, {uv.size(0), uv.size(1), uv.size(2)});
  Sampler<T> sampler = {read<T>(uv), read<T>(lod), {}, size_of(chain, 2), uv.size(1) * uv.size(2), 0, clamp};
  STD_TORCH_CHECK(sizes.size() >= 2 && sizes.size() % 2 == 0 && sizes.size() <= 2 * max_levels, "bad sizes of levels");
  for (size_t i = 0; i < sizes.size(); i += 2) {
    const int64_t h = sizes[i], w = sizes[i + 1];
    STD_TORCH_CHECK(h >= 1 && h < (1 << 24) && w >= 1 && w < (1 << 24), "a picture of ", h, " x ", w, " texels");
    sampler.levels.level[sampler.levels.count++] = {sampler.levels.texels, static_cast<int32_t>(h),
                                                    static_cast<int32_t>(w)};
    sampler.levels.texels += h * w;
  }
  check(chain, "chain", uv, type, {any_size, sampler.levels.texels, any_size});
  STD_TORCH_CHECK(chain.size(0) == 1 || chain.size(0) == uv.size(0), chain.size(0), " pictures do not fit to ",
                  uv.size(0), " views");
  sampler.shared = chain.size(0) == 1;
  return sampler;
}

Tensor texture(const Tensor& chain, Sizes sizes, const Tensor& uv, const std::optional<Tensor>& lod, bool clamp) {
  return dispatch(uv, "uv", [&](auto real) {
    using T = decltype(real);
    const Sampler<T> from = sampler_of<T>(chain, sizes, uv, lod, clamp);
    Tensor out = new_output(uv, {uv.size(0), uv.size(1), uv.size(2), from.channels}, uv.scalar_type());
    run(uv, Sample<T>{pixels_of(uv), from, read<T>(chain), write<T>(out)});
    return out;
  });
}

Tensor texture_backward(const Tensor& chain, Sizes sizes, const Tensor& uv, const std::optional<Tensor>& lod,
                        bool clamp, const Tensor& grad) {
  return dispatch(uv, "uv", [&](auto real) {
    using T = decltype(real);
    const Sampler<T> from = sampler_of<T>(chain, sizes, uv, lod, clamp);
    check(grad, "grad", uv, uv.scalar_type(), {uv.size(0), uv.size(1), uv.size(2), from.channels});
    const int64_t count = chain.size(0);
    Tensor out = new_zeros(chain, {count, from.levels.texels, from.channels});
    add(uv, SampleGradient<T>{pixels_of(uv), from, read<T>(grad),
                              {write<T>(out), count, count * from.levels.texels, from.channels}});
    return out;
  });
}

Tensor texture_uv_backward(const Tensor& chain, Sizes sizes, const Tensor& uv, const std::optional<Tensor>& lod,
                           bool clamp, const Tensor& grad) {
  return dispatch(uv, "uv", [&](auto real) {
    using T = decltype(real);
    const Sampler<T> from = sampler_of<T>(chain, sizes, uv, lod, clamp);
    check(grad, "grad", uv, uv.scalar_type(), {uv.size(0), uv.size(1), uv.size(2), from.channels});
    Tensor out = new_output(uv, {uv.size(0), uv.size(1), uv.size(2), 2}, uv.scalar_type());
    run(uv, SamplePlaceGradient<T>{pixels_of(uv), from, read<T>(chain), read<T>(grad), write<T>(out)});
    return out;
  });
}

}  // namespace
}  // namespace somnium::rasterizer

#define SOMNIUM_OPERATORS(library)                                                                                 \
  library.impl("rasterize", TORCH_BOX(&somnium::rasterizer::rasterize));                                           \
  library.impl("rasterize_backward", TORCH_BOX(&somnium::rasterizer::rasterize_backward));                         \
  library.impl("interpolate", TORCH_BOX(&somnium::rasterizer::interpolate));                                       \
  library.impl("interpolate_backward", TORCH_BOX(&somnium::rasterizer::interpolate_backward));                     \
  library.impl("interpolate_raster_backward", TORCH_BOX(&somnium::rasterizer::interpolate_raster_backward));     \
  library.impl("antialias", TORCH_BOX(&somnium::rasterizer::antialias));                                           \
  library.impl("antialias_colour_backward", TORCH_BOX(&somnium::rasterizer::antialias_colour_backward));           \
  library.impl("antialias_backward", TORCH_BOX(&somnium::rasterizer::antialias_backward));                         \
  library.impl("texture", TORCH_BOX(&somnium::rasterizer::texture));                                               \
  library.impl("texture_backward", TORCH_BOX(&somnium::rasterizer::texture_backward));                             \
  library.impl("texture_uv_backward", TORCH_BOX(&somnium::rasterizer::texture_uv_backward))

STABLE_TORCH_LIBRARY(somnium_rasterizer, library) {
  library.def(
      "rasterize(Tensor positions, Tensor faces, int height, int width, bool derivatives) -> (Tensor, Tensor)");
  library.def("rasterize_backward(Tensor positions, Tensor faces, Tensor raster, Tensor grad) -> Tensor");
  library.def("interpolate(Tensor attributes, Tensor raster, Tensor faces, Tensor? raster_db) -> (Tensor, Tensor)");
  library.def("interpolate_backward(Tensor attributes, Tensor raster, Tensor faces, Tensor grad) -> Tensor");
  library.def("interpolate_raster_backward(Tensor attributes, Tensor raster, Tensor faces, Tensor grad) -> Tensor");
  library.def(
      "antialias(Tensor colour, Tensor raster, Tensor positions, Tensor faces, Tensor topology) "
      "-> (Tensor, Tensor, Tensor)");
  library.def("antialias_colour_backward(Tensor blends, Tensor grad) -> Tensor");
  library.def(
      "antialias_backward(Tensor colour, Tensor positions, Tensor faces, Tensor blends, Tensor edges, Tensor grad) "
      "-> Tensor");
  library.def("edges_of(Tensor faces) -> Tensor");
  library.def("texture(Tensor chain, int[] sizes, Tensor uv, Tensor? lod, bool clamp) -> Tensor");
  library.def(
      "texture_backward(Tensor chain, int[] sizes, Tensor uv, Tensor? lod, bool clamp, Tensor grad) -> Tensor");
  library.def(
      "texture_uv_backward(Tensor chain, int[] sizes, Tensor uv, Tensor? lod, bool clamp, Tensor grad) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(somnium_rasterizer, CPU, library) {
  SOMNIUM_OPERATORS(library);
  library.impl("edges_of", TORCH_BOX(&somnium::rasterizer::edges_of));  // elsewhere torch sorts
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(somnium_rasterizer, CUDA, library) { SOMNIUM_OPERATORS(library); }
#endif
