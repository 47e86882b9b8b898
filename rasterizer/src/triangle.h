// One triangle and one pixel: who is seen where, the weights of the corners, and their gradient. All in double: the
// picture's own coordinates then serve everywhere, and a float picture gets the nearest float of everything.
//
// A corner is P = (X, Y, w), its clip position with X = (x + w) W / 2 and Y = (w - y) H / 2. With the pixel's centre
// q = (column + 1/2, row + 1/2, 1) the weight of corner 0 is a_0 = q . (P_1 x P_2), and so on round the triangle; the
// pixel lies in the triangle where all three have the sign of det(P). See reference.py.
#pragma once

#include <cstring>

#include "platform.h"

namespace somnium::rasterizer {

constexpr double box_slack = 1e-3;  // pixels by which a bounding box is widened: only speed depends on it

// a b + c, rounded in the same way wherever it stands: two triangles must agree about the edge that they share.
HOST_DEVICE double multiply_add(double a, double b, double c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__CUDA_ARCH__)
  return std::fma(a, b, c);
#else
  return a * b + c;  // nothing that the compiler could fuse it to
#endif
}

struct Corner {
  double x, y, z, w;  // X, Y, z, w
};

// What a view is drawn with. Faces that name a vertex that is not there, or one that is not finite, are not drawn.
template <class T>
struct Mesh {
  const T* positions;    // [B, V, 4]
  const int32_t* faces;  // [F, 3]
  int64_t vertices, face_count;
  int32_t height, width;

  HOST_DEVICE Corner corner(int64_t view, int64_t vertex) const {
    const T* p = positions + 4 * (view * vertices + vertex);
    const double w = p[3];
    return {(p[0] + w) * (0.5 * width), (w - p[1]) * (0.5 * height), p[2], w};
  }
  HOST_DEVICE bool known(int64_t face) const {
    const int32_t* v = faces + 3 * face;
    const auto count = static_cast<uint64_t>(vertices);
    return static_cast<uint32_t>(v[0]) < count && static_cast<uint32_t>(v[1]) < count &&
           static_cast<uint32_t>(v[2]) < count;
  }
};

HOST_DEVICE bool finite(const Corner& p) { return std::isfinite(p.x + p.y + p.z + p.w); }

// a_k = A column + B row + C, with the sign that makes it positive inside.
struct Triangle {
  double A[3], B[3], C[3];
  double z[3], w[3];

  HOST_DEVICE void weights(double column, double row, double* a) const {
    UNROLL for (int k = 0; k < 3; ++k) a[k] = multiply_add(A[k], column, multiply_add(B[k], row, C[k]));
  }
  // z/w where the weights are a: a mean of the corners', so that no sliver can miss their range.
  HOST_DEVICE double depth(const double* a) const {
    return (a[0] * z[0] + a[1] * z[1] + a[2] * z[2]) / (a[0] * w[0] + a[1] * w[1] + a[2] * w[2]);
  }
  // What decides who is nearer.
  HOST_DEVICE float rounded_depth(const double* a) const {
    return static_cast<float>(depth(a)) + 0.0f;  // -0.0 becomes 0.0
  }
};

HOST_DEVICE bool inside(const double* a) {
  return a[0] >= 0 && a[1] >= 0 && a[2] >= 0 && a[0] + a[1] + a[2] > 0;
}

HOST_DEVICE bool before(const Corner& a, const Corner& b) {
  return a.x != b.x ? a.x < b.x : a.y != b.y ? a.y < b.y : a.w < b.w;
}

// False for a triangle without an area. The ends of an edge are taken in an order that depends on where they are: fused
// operations round a x b and -(b x a) differently, and two triangles must get the same numbers, but for the sign, for the
// edge that they share, or a pixel between them could be missed.
HOST_DEVICE bool prepare(const Corner* p, Triangle* out) {
  UNROLL for (int k = 0; k < 3; ++k) {
    const Corner &from = p[(k + 1) % 3], &to = p[(k + 2) % 3];
    const bool swap = before(to, from);
    const Corner &a = swap ? to : from, &b = swap ? from : to;
    const double sign = swap ? -1 : 1;
    out->A[k] = sign * multiply_add(a.y, b.w, -(b.y * a.w));
    out->B[k] = sign * multiply_add(a.w, b.x, -(b.w * a.x));
    out->C[k] = sign * multiply_add(a.x, b.y, -(b.x * a.y));
    out->z[k] = p[k].z;
    out->w[k] = p[k].w;
  }
  const double det = out->A[0] * p[0].x + out->B[0] * p[0].y + out->C[0] * p[0].w;
  if (!(std::isfinite(det) && det != 0)) return false;
  const double sign = det < 0 ? -1 : 1;
  UNROLL for (int k = 0; k < 3; ++k) {
    out->A[k] *= sign;
    out->B[k] *= sign;
    out->C[k] *= sign;
  }
  return true;
}

// The pixels [x0, x1] x [y0, y1] whose centres may lie in a triangle; empty where x0 > x1 or y0 > y1.
struct Box {
  int32_t x0, y0, x1, y1;
  HOST_DEVICE bool empty() const { return x0 > x1 || y0 > y1; }
};

struct Range {
  double low, high;
  HOST_DEVICE void add(double value) {
    low = value < low ? value : low;
    high = value > high ? value : high;
  }
  HOST_DEVICE int32_t first() const {
    const double at = std::ceil(low - 0.5 - box_slack);
    return at > 0 ? (at < 1e9 ? static_cast<int32_t>(at) : 1000000000) : 0;
  }
  HOST_DEVICE int32_t last(int32_t size) const {
    const double at = std::floor(high - 0.5 + box_slack);
    return at < size - 1 ? (at > -1 ? static_cast<int32_t>(at) : -1) : size - 1;
  }
};

// Only what lies before the near plane z = -w counts.
HOST_DEVICE Box box_of(const Corner* p, int32_t height, int32_t width) {
  constexpr double infinity = 1e300;
  Range x = {infinity, -infinity}, y = x;
  bool everywhere = false;
  UNROLL for (int k = 0; k < 3; ++k) {
    const Corner &a = p[k], &b = p[(k + 1) % 3];
    const double near_a = a.z + a.w, near_b = b.z + b.w;
    if (near_a >= 0) {
      everywhere = everywhere || !(a.w > 0);
      x.add(a.x / a.w);
      y.add(a.y / a.w);
    }
    if ((near_a >= 0) != (near_b >= 0)) {
      const double t = near_a / (near_a - near_b), w = a.w + t * (b.w - a.w);
      everywhere = everywhere || !(w > 0);
      x.add((a.x + t * (b.x - a.x)) / w);
      y.add((a.y + t * (b.y - a.y)) / w);
    }
  }
  if (everywhere) return {0, 0, width - 1, height - 1};
  return {x.first(), y.first(), x.last(width), y.last(height)};
}

// The depth and the face in one number that is smaller for what is nearer; equal depths: the smaller face.
HOST_DEVICE uint64_t depth_key(float depth, int64_t face) {
  uint32_t bits;
  std::memcpy(&bits, &depth, sizeof bits);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(bits) << 32 | static_cast<uint32_t>(face);
}

// Rows of a gradient that items add to: `groups` blocks of items, each with rows of its own.
template <class T>
struct Target {
  T* values;
  int64_t groups, rows, width;  // rows: of all groups together
};

// Where item i lies.
struct Pixel {
  int64_t view;
  int32_t row, column;
};

HOST_DEVICE Pixel pixel_of(int64_t i, int32_t height, int32_t width) {
  const int64_t line = i / width, view = line / height;
  return {view, static_cast<int32_t>(line - view * height), static_cast<int32_t>(i - line * width)};
}

// The face that a raster's number names, -1 where nothing or no face of this mesh is seen.
template <class T>
HOST_DEVICE int64_t face_of(T number, int64_t face_count) {
  return number >= 1 && number <= static_cast<T>(face_count) ? static_cast<int64_t>(number) - 1 : -1;
}

// What the pixels that show a face get; the face has an area.
template <class T>
struct Shader {
  Triangle triangle;
  int64_t face;

  HOST_DEVICE Shader(const Mesh<T>& mesh, int64_t view, int64_t shown) : face(shown) {
    const int32_t* v = mesh.faces + 3 * face;
    const Corner p[3] = {mesh.corner(view, v[0]), mesh.corner(view, v[1]), mesh.corner(view, v[2])};
    prepare(p, &triangle);
  }

  // out = (u, v, z/w, face + 1), slopes = (du/dX, du/dY, dv/dX, dv/dY) unless null.
  HOST_DEVICE void operator()(int32_t row, int32_t column, T* out, T* slopes) const {
    const Triangle& t = triangle;
    double a[3];
    t.weights(column + 0.5, row + 0.5, a);
    const double scale = 1 / (a[0] + a[1] + a[2]), u = a[0] * scale, v = a[1] * scale;
    out[0] = static_cast<T>(u);
    out[1] = static_cast<T>(v);
    out[2] = static_cast<T>(t.depth(a));
    out[3] = static_cast<T>(face + 1);
    if (!slopes) return;
    const double A = t.A[0] + t.A[1] + t.A[2], B = t.B[0] + t.B[1] + t.B[2];
    slopes[0] = static_cast<T>((t.A[0] - u * A) * scale);
    slopes[1] = static_cast<T>((t.B[0] - u * B) * scale);
    slopes[2] = static_cast<T>((t.A[1] - v * A) * scale);
    slopes[3] = static_cast<T>((t.B[1] - v * B) * scale);
  }
};

// Gradient of gu u + gv v + gz z/w in the clip positions of the three corners: out[corner][x, y, z, w].
template <class T>
HOST_DEVICE void shade_gradient(const Mesh<T>& mesh, int64_t view, int64_t face, int32_t row, int32_t column,
                                const T* grad, T out[3][4]) {
  const double c = column + 0.5, r = row + 0.5;
  double x[3], y[3], z[3], w[3], a[3];  // x, y: from the pixel's centre
  UNROLL for (int k = 0; k < 3; ++k) {
    const Corner p = mesh.corner(view, mesh.faces[3 * face + k]);
    x[k] = p.x - c * p.w;
    y[k] = p.y - r * p.w;
    z[k] = p.z;
    w[k] = p.w;
  }
  UNROLL for (int k = 0; k < 3; ++k) a[k] = x[(k + 1) % 3] * y[(k + 2) % 3] - x[(k + 2) % 3] * y[(k + 1) % 3];
  const double scale = 1 / (a[0] + a[1] + a[2]);
  const double per_w = 1 / (a[0] * w[0] + a[1] * w[1] + a[2] * w[2]);
  const double depth = (a[0] * z[0] + a[1] * z[1] + a[2] * z[2]) * per_w;
  const double gu = grad[0], gv = grad[1], gz = grad[2] * per_w;
  const double mean = (gu * a[0] + gv * a[1]) * scale;
  double ga[3];
  UNROLL for (int k = 0; k < 3; ++k) {
    ga[k] = ((k == 0 ? gu : k == 1 ? gv : 0) - mean) * scale + gz * (z[k] - depth * w[k]);
  }
  UNROLL for (int k = 0; k < 3; ++k) {  // corner k stands in the weights of the other two
    const int next = (k + 1) % 3, last = (k + 2) % 3;
    const double gx = ga[last] * y[next] - ga[next] * y[last], gy = ga[next] * x[last] - ga[last] * x[next];
    out[k][0] = static_cast<T>(gx * (0.5 * mesh.width));
    out[k][1] = static_cast<T>(-gy * (0.5 * mesh.height));
    out[k][2] = static_cast<T>(gz * a[k]);
    out[k][3] = static_cast<T>(gx * (0.5 * mesh.width - c) + gy * (0.5 * mesh.height - r) - gz * depth * a[k]);
  }
}

}  // namespace somnium::rasterizer
