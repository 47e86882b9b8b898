// CUDA launches: a thread per item; a triangle is drawn by a warp, the nearest one found by an atomic minimum over depth and
// face in one number, so the picture is the same on every run. Gradients are added atomically.
#include "cuda_launch.h"
#include "kernel.h"

namespace somnium::rasterizer {
namespace {

constexpr int lanes = 32;

template <class T>
__global__ void draw(const __grid_constant__ Mesh<T> mesh, const int64_t views,
                     unsigned long long* __restrict__ nearest) {
  const int64_t pixels = static_cast<int64_t>(mesh.height) * mesh.width;
  SOMNIUM_FOR_EACH(i, views * mesh.face_count * lanes) {
    const int64_t at = i / lanes, view = at / mesh.face_count, face = at - view * mesh.face_count;
    if (!mesh.known(face)) continue;
    const int32_t* v = mesh.faces + 3 * face;
    const Corner p[3] = {mesh.corner(view, v[0]), mesh.corner(view, v[1]), mesh.corner(view, v[2])};
    if (!finite(p[0]) || !finite(p[1]) || !finite(p[2])) continue;
    const Box box = box_of(p, mesh.height, mesh.width);
    Triangle triangle;
    if (box.empty() || !prepare(p, &triangle)) continue;
    const int64_t width = box.x1 - box.x0 + 1, count = width * (box.y1 - box.y0 + 1);
    for (int64_t k = i % lanes; k < count; k += lanes) {
      const int64_t row = box.y0 + k / width, column = box.x0 + k % width;
      double a[3];
      triangle.weights(static_cast<double>(column) + 0.5, static_cast<double>(row) + 0.5, a);
      if (!inside(a)) continue;
      const float depth = triangle.rounded_depth(a);
      if (depth >= -1 && depth <= 1) {
        atomicMin(nearest + view * pixels + row * mesh.width + column,
                  static_cast<unsigned long long>(depth_key(depth, face)));
      }
    }
  }
}

template <class T>
__global__ void fill(const __grid_constant__ Mesh<T> mesh, const int64_t pixels,
                     const unsigned long long* __restrict__ nearest, T* __restrict__ raster, T* __restrict__ slopes) {
  SOMNIUM_FOR_EACH(i, pixels) {
    const unsigned long long key = nearest[i];
    if (key != ~0ull) {
      const Pixel at = pixel_of(i, mesh.height, mesh.width);
      const Shader<T> shader(mesh, at.view, static_cast<int64_t>(key & 0xffffffffull));
      shader(at.row, at.column, raster + 4 * i, slopes ? slopes + 4 * i : nullptr);
      continue;
    }
    for (int k = 0; k < 4; ++k) raster[4 * i + k] = 0;
    for (int k = 0; k < 4 && slopes; ++k) slopes[4 * i + k] = 0;
  }
}

template <class Body>
__global__ void run_items(const __grid_constant__ Body body) {
  SOMNIUM_FOR_EACH(i, body.items) body(i);
}

template <class T>
struct Atomic {
  T* values;
  __device__ bool wants(int64_t) const { return true; }
  __device__ void operator()(int64_t at, T value) const { atomicAdd(values + at, value); }
};

template <class Body, class T>
__global__ void add_items(const __grid_constant__ Body body, const Atomic<T> add) {
  SOMNIUM_FOR_EACH(i, body.items) body(i, add);
}

}  // namespace

template <class T>
const char* rasterize_cuda(const Mesh<T>& mesh, int64_t views, uint64_t* nearest, T* raster, T* slopes, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  auto* keys = reinterpret_cast<unsigned long long*>(nearest);
  const int64_t pixels = views * mesh.height * mesh.width, threads = views * mesh.face_count * lanes;
  const cudaError_t cleared = cudaMemsetAsync(keys, 0xff, pixels * sizeof *keys, queue);
  if (cleared != cudaSuccess) return cudaGetErrorString(cleared);
  if (threads) draw<T><<<blocks_for(threads), threads_per_block, 0, queue>>>(mesh, views, keys);
  fill<T><<<blocks_for(pixels), threads_per_block, 0, queue>>>(mesh, pixels, keys, raster, slopes);
  return launch_error();
}

template <class Body>
const char* run_cuda(const Body& body, void* stream) {
  if (body.items == 0) return nullptr;
  run_items<<<blocks_for(body.items), threads_per_block, 0, static_cast<cudaStream_t>(stream)>>>(body);
  return launch_error();
}

template <class Body>
const char* add_cuda(const Body& body, void* stream) {
  if (body.items == 0) return nullptr;
  using T = std::remove_reference_t<decltype(*body.target.values)>;
  add_items<<<blocks_for(body.items), threads_per_block, 0, static_cast<cudaStream_t>(stream)>>>(
      body, Atomic<T>{body.target.values});
  return launch_error();
}

template const char* rasterize_cuda(const Mesh<float>&, int64_t, uint64_t*, float*, float*, void*);
template const char* rasterize_cuda(const Mesh<double>&, int64_t, uint64_t*, double*, double*, void*);

#define SOMNIUM_RUN_CUDA(...) template const char* run_cuda(const __VA_ARGS__&, void*);
#define SOMNIUM_ADD_CUDA(...) template const char* add_cuda(const __VA_ARGS__&, void*);
SOMNIUM_RASTERIZER_RUN(SOMNIUM_RUN_CUDA)
SOMNIUM_RASTERIZER_ADD(SOMNIUM_ADD_CUDA)

}  // namespace somnium::rasterizer
