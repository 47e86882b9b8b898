// What the operators do, pixel by pixel. A struct holds an operator's arguments; one with operator()(i) computes item i of
// its output, one with operator()(i, add) adds what item i gives to the rows of a gradient. cpu.cpp loops over the items,
// cuda.cu gives each a thread. Arrays are row-major and named like the Python functions' arguments.
#pragma once

#include "sample.h"
#include "silhouette.h"
#include "triangle.h"

namespace somnium::rasterizer {

// Draws all views: raster [B, H, W, 4], slopes the same or null.
template <class T>
void rasterize_cpu(const Mesh<T>& mesh, int64_t views, T* raster, T* slopes);
// nearest [B, H, W]: room for the nearest triangle's depth and number.
template <class T>
const char* rasterize_cuda(const Mesh<T>& mesh, int64_t views, uint64_t* nearest, T* raster, T* slopes, void* stream);

template <class T>
struct RasterizeGradient {
  int64_t items;  // pixels
  Mesh<T> mesh;
  const T *raster, *grad;
  Target<T> target;  // [B V, 4]

  template <class Add>
  HOST_DEVICE void operator()(int64_t i, const Add& add) const {
    const int64_t face = face_of(raster[4 * i + 3], mesh.face_count);
    if (face < 0 || !mesh.known(face)) return;
    const T* g = grad + 4 * i;
    if (g[0] == 0 && g[1] == 0 && g[2] == 0) return;
    const Pixel at = pixel_of(i, mesh.height, mesh.width);
    int64_t row[3];
    bool wanted = false;
    UNROLL for (int k = 0; k < 3; ++k) {
      row[k] = at.view * mesh.vertices + mesh.faces[3 * face + k];
      wanted = wanted || add.wants(row[k]);
    }
    if (!wanted) return;
    T corners[3][4];
    shade_gradient(mesh, at.view, face, at.row, at.column, g, corners);
    UNROLL for (int k = 0; k < 3; ++k) {
      if (!add.wants(row[k])) continue;
      UNROLL for (int axis = 0; axis < 4; ++axis) add(4 * row[k] + axis, corners[k][axis]);
    }
  }
};

// The raster's triangles as `interpolate` sees them; attributes [b, V, C] are shared by all views if b = 1.
template <class T>
struct Attributes {
  const T* raster;
  const int32_t* faces;
  int64_t face_count, vertices, channels, pixels, shared;  // pixels: of a view

  // The rows of the three corners' attributes, false where nothing is seen.
  HOST_DEVICE bool rows(int64_t i, int64_t* row) const {
    const int64_t face = face_of(raster[4 * i + 3], face_count);
    if (face < 0) return false;
    const int64_t first = shared ? 0 : i / pixels * vertices;
    UNROLL for (int k = 0; k < 3; ++k) {
      const int64_t vertex = faces[3 * face + k];
      if (vertex < 0 || vertex >= vertices) return false;
      row[k] = first + vertex;
    }
    return true;
  }
};

template <class T>
struct Interpolate {
  int64_t items;  // pixels
  Attributes<T> from;
  const T *attributes, *slopes;  // slopes [B, H, W, 4] or null
  T *out, *out_slopes;           // [B, H, W, C], [B, H, W, 2C] or null

  HOST_DEVICE void operator()(int64_t i) const {
    const int64_t C = from.channels;
    int64_t row[3];
    if (!from.rows(i, row)) {
      for (int64_t c = 0; c < C; ++c) out[C * i + c] = 0;
      if (slopes) {
        for (int64_t c = 0; c < 2 * C; ++c) out_slopes[2 * C * i + c] = 0;
      }
      return;
    }
    const T u = from.raster[4 * i], v = from.raster[4 * i + 1], w = 1 - u - v;
    const T *a0 = attributes + C * row[0], *a1 = attributes + C * row[1], *a2 = attributes + C * row[2];
    for (int64_t c = 0; c < C; ++c) out[C * i + c] = u * a0[c] + v * a1[c] + w * a2[c];
    if (!slopes) return;
    const T* s = slopes + 4 * i;
    T *along_x = out_slopes + 2 * C * i, *along_y = along_x + C;
    for (int64_t c = 0; c < C; ++c) {
      const T to_u = a0[c] - a2[c], to_v = a1[c] - a2[c];
      along_x[c] = s[0] * to_u + s[2] * to_v;
      along_y[c] = s[1] * to_u + s[3] * to_v;
    }
  }
};

// The gradient in the raster's u and v.
template <class T>
struct InterpolateRasterGradient {
  int64_t items;  // pixels
  Attributes<T> from;
  const T *attributes, *grad;
  T* out;  // [B, H, W, 4]

  HOST_DEVICE void operator()(int64_t i) const {
    const int64_t C = from.channels;
    int64_t row[3];
    T gu = 0, gv = 0;
    if (from.rows(i, row)) {
      const T *a0 = attributes + C * row[0], *a1 = attributes + C * row[1], *a2 = attributes + C * row[2];
      for (int64_t c = 0; c < C; ++c) {
        gu += grad[C * i + c] * (a0[c] - a2[c]);
        gv += grad[C * i + c] * (a1[c] - a2[c]);
      }
    }
    T* to = out + 4 * i;
    to[0] = gu;
    to[1] = gv;
    to[2] = to[3] = 0;
  }
};

template <class T>
struct InterpolateGradient {
  int64_t items;  // pixels
  Attributes<T> from;
  const T* grad;
  Target<T> target;  // [b V, C]

  template <class Add>
  HOST_DEVICE void operator()(int64_t i, const Add& add) const {
    int64_t row[3];
    if (!from.rows(i, row)) return;
    const int64_t C = from.channels;
    const T u = from.raster[4 * i], v = from.raster[4 * i + 1];
    const T weight[3] = {u, v, 1 - u - v};
    UNROLL for (int k = 0; k < 3; ++k) {
      if (!add.wants(row[k])) continue;
      for (int64_t c = 0; c < C; ++c) add(C * row[k] + c, weight[k] * grad[C * i + c]);
    }
  }
};

// For each face's edges the next edge of the ring of those that join the same vertices, as reference.py's edges_of.
void edges_cpu(const int32_t* faces, int64_t face_count, int32_t* ring);

template <class Body>
void run_cpu(const Body& body);
template <class Body>
const char* run_cuda(const Body& body, void* stream);
template <class Body>
void add_cpu(const Body& body);
template <class Body>
const char* add_cuda(const Body& body, void* stream);

// The operators that are compiled, for cpu.cpp and cuda.cu.
#define SOMNIUM_RASTERIZER_RUN_FOR(X, T) \
  X(Interpolate<T>)                      \
  X(InterpolateRasterGradient<T>)        \
  X(Project<T>)                          \
  X(Silhouettes<T>)                      \
  X(Blend<T>)                            \
  X(BlendGradient<T>)                    \
  X(Sample<T>)                           \
  X(SamplePlaceGradient<T>)
#define SOMNIUM_RASTERIZER_ADD_FOR(X, T) \
  X(RasterizeGradient<T>)                \
  X(InterpolateGradient<T>)              \
  X(EdgeGradient<T>)                     \
  X(SampleGradient<T>)
#define SOMNIUM_RASTERIZER_RUN(X) SOMNIUM_RASTERIZER_RUN_FOR(X, float) SOMNIUM_RASTERIZER_RUN_FOR(X, double)
#define SOMNIUM_RASTERIZER_ADD(X) SOMNIUM_RASTERIZER_ADD_FOR(X, float) SOMNIUM_RASTERIZER_ADD_FOR(X, double)

}  // namespace somnium::rasterizer
