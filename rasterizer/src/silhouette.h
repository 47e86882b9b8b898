// Where a surface ends between two neighbouring pixels, and what that does to their colours. See silhouettes.py.
#pragma once

#include "triangle.h"

namespace somnium::rasterizer {

constexpr int max_steps = 512;  // triangles that a walk between two pixels passes at most
constexpr int max_sharing = 8;  // faces looked at around one edge
constexpr double fold = 1e-3;   // pixels: a surface that turns back by less goes on

// Where the vertices are on the screen, for each view: column and row, NaN for what has no place there.
template <class T>
struct Project {
  int64_t items;  // vertices of all views
  Mesh<T> mesh;
  double* places;  // [B V, 2]

  HOST_DEVICE void operator()(int64_t i) const {
    const Corner p = mesh.corner(0, i);
    const bool good = p.w > 0 && finite(p);
    places[2 * i] = good ? p.x / p.w : NAN;
    places[2 * i + 1] = good ? p.y / p.w : NAN;
  }
};

// A point relative to a pixel's centre: `along` the line to its neighbour, and `across` it.
struct Point {
  double along, across;
};

// Where the edge a b crosses the line.
HOST_DEVICE double crossing(Point a, Point b) {
  return (a.along * b.across - b.along * a.across) / (b.across - a.across);
}

// A line on the screen from a pixel's centre, along an axis (0: columns), forwards or backwards; and the surface there.
struct Line {
  const double* places;  // [V, 2]: of the view
  const int32_t *faces, *ring;
  int64_t face_count, vertices;
  double origin[2];
  int axis;
  double sign;

  HOST_DEVICE bool point(int32_t vertex, Point* out) const {
    if (static_cast<uint32_t>(vertex) >= static_cast<uint64_t>(vertices)) return false;
    const double* place = places + 2 * static_cast<int64_t>(vertex);
    *out = {sign * (place[axis] - origin[axis]), place[1 - axis] - origin[1 - axis]};
    return out->along == out->along;  // NaN has no place
  }
};

struct Ending {
  int32_t edge;  // 3 face + k, -1: none
  bool same;     // the walk came to the goal
};

// Where the line leaves a face that it entered by its edge `entry`: the edge, and how far from the origin.
struct Exit {
  int edge;
  double distance;
};

// With entry = -1 the line starts within the face. A corner without a place is infinitely far. Sides are told by the
// corners alone, so that every face that is entered has just one other edge to leave by.
HOST_DEVICE Exit leave(const Line& line, int32_t face, int entry) {
  Point p[3];
  for (int k = 0; k < 3; ++k) {
    if (!line.point(line.faces[3 * face + k], p + k)) return {-1, INFINITY};
  }
  Exit exit = {-1, -INFINITY};
  for (int k = 0; k < 3; ++k) {
    const Point &a = p[(k + 1) % 3], &b = p[(k + 2) % 3];
    if (k == entry || (a.across >= 0) == (b.across >= 0)) continue;
    const double distance = crossing(a, b);
    if (distance > exit.distance) exit = {k, distance};
  }
  return exit;
}

// Walks over the surface from `face`, seen at the line's origin, one pixel on, as far as the face `goal`.
HOST_DEVICE Ending walk(const Line& line, int32_t face, int32_t goal) {
  Exit exit = leave(line, face, -1);
  double furthest = 0;
  int32_t edge = -1;
  for (int step = 0; step < max_steps; ++step) {
    if (!(exit.distance < 1)) return {-1, false};
    if (exit.distance < furthest - fold) return {edge, false};
    const int32_t own = 3 * face + exit.edge;
    if (edge < 0 || exit.distance > furthest) {
      furthest = exit.distance;
      edge = own;
    }
    int32_t across = -1;
    exit.distance = -INFINITY;
    for (int32_t next = line.ring[own], shared = 0; next != own && shared < max_sharing; ++shared) {
      if (next < 0 || next >= 3 * line.face_count) return {-1, false};
      const Exit other = leave(line, next / 3, next % 3);
      if (other.distance > exit.distance) {
        exit = other;
        across = next;
      }
      next = line.ring[next];
    }
    if (across < 0) return {edge, false};
    face = across / 3;
    if (face == goal) return {-1, true};
  }
  return {-1, false};
}

// The silhouette between a pixel and its neighbour to the right (axis 0) or below: blends [B, H, W, 2] is s - 1/2, edges
// [B, H, W, 2] its edge + 1, or 0.
template <class T>
struct Silhouettes {
  int64_t items;  // pixels
  const T* raster;
  const double* places;  // [B V, 2]
  const int32_t *faces, *ring;
  int64_t face_count, vertices;
  int32_t height, width;
  T* blends;
  int32_t* edges;

  HOST_DEVICE void operator()(int64_t i) const {
    const T number = raster[4 * i + 3];
    const int32_t column = static_cast<int32_t>(i % width), row = static_cast<int32_t>(i / width % height);
    for (int axis = 0; axis < 2; ++axis) {
      const int64_t j = i + (axis ? width : 1), at = 2 * i + axis;
      edges[at] = 0;
      blends[at] = 0;
      if (axis ? row + 1 == height : column + 1 == width) continue;
      if (raster[4 * j + 3] != number) between(i, j, row, column, axis, at);
    }
  }

 private:
  HOST_DEVICE void between(int64_t i, int64_t j, int32_t row, int32_t column, int axis, int64_t at) const {
    const int32_t face[2] = {static_cast<int32_t>(face_of(raster[4 * i + 3], face_count)),
                             static_cast<int32_t>(face_of(raster[4 * j + 3], face_count))};
    if (face[0] < 0 && face[1] < 0) return;
    const bool second = face[0] < 0 || (face[1] >= 0 && raster[4 * j + 2] < raster[4 * i + 2]);
    const int64_t view = i / (static_cast<int64_t>(height) * width);
    Line line = {places + 2 * view * vertices, faces, ring, face_count, vertices, {}, axis, 1};
    const auto start_at = [&](int end) {
      line.origin[0] = column + 0.5;
      line.origin[1] = row + 0.5;
      line.origin[axis] += end;
      line.sign = end ? -1 : 1;
    };
    Ending ending = {-1, false};
    for (int attempt = 0; attempt < 2 && ending.edge < 0 && !ending.same; ++attempt) {
      const int from = attempt == 0 ? second : !second;
      if (face[from] < 0) return;
      start_at(from);
      ending = walk(line, face[from], face[1 - from]);
    }
    if (ending.edge < 0) return;
    start_at(0);
    const int32_t *v = faces + ending.edge / 3 * 3, k = ending.edge % 3;
    Point a, b;
    line.point(v[(k + 1) % 3], &a);
    line.point(v[(k + 2) % 3], &b);
    const double along = std::fabs(a.along - b.along), across = std::fabs(a.across - b.across);
    if (axis ? across <= along : across < along) return;  // it counts for the other axis
    blends[at] = static_cast<T>(crossing(a, b) - 0.5);
    edges[at] = ending.edge + 1;
  }
};

// Calls body(i, j, blend) for the up to four pairs of neighbours that a pixel is in; i is left of j or above it.
template <class T, class Body>
HOST_DEVICE void for_pairs(const T* blends, int64_t pixel, int32_t height, int32_t width, const Body& body) {
  const int64_t column = pixel % width, row = pixel / width % height;
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t step = axis ? width : 1, before = axis ? row : column;
    const T onward = blends[2 * pixel + axis], back = before > 0 ? blends[2 * (pixel - step) + axis] : T(0);
    if (onward != 0) body(pixel, pixel + step, onward);
    if (back != 0) body(pixel - step, pixel, back);
  }
}

template <class T>
struct Blend {
  int64_t items;  // pixels
  const T *colour, *blends;
  int64_t channels;
  int32_t height, width;
  T* out;

  HOST_DEVICE void operator()(int64_t i) const {
    for (int64_t c = 0; c < channels; ++c) out[i * channels + c] = colour[i * channels + c];
    for_pairs(blends, i, height, width, [&](int64_t p, int64_t q, T blend) {
      if ((blend < 0 ? p : q) != i) return;
      for (int64_t c = 0; c < channels; ++c) {
        out[i * channels + c] += blend * (colour[p * channels + c] - colour[q * channels + c]);
      }
    });
  }
};

template <class T>
struct BlendGradient {
  int64_t items;  // pixels
  const T *grad, *blends;
  int64_t channels;
  int32_t height, width;
  T* out;

  HOST_DEVICE void operator()(int64_t i) const {
    for (int64_t c = 0; c < channels; ++c) out[i * channels + c] = grad[i * channels + c];
    for_pairs(blends, i, height, width, [&](int64_t p, int64_t q, T blend) {
      const int64_t to = blend < 0 ? p : q;
      const T weight = p == i ? blend : -blend;
      for (int64_t c = 0; c < channels; ++c) out[i * channels + c] += weight * grad[to * channels + c];
    });
  }
};

template <class T>
struct EdgeGradient {
  int64_t items;  // pixels
  Mesh<T> mesh;
  const T *colour, *grad, *blends;
  const int32_t* edges;
  int64_t channels;
  Target<T> target;  // [B V, 4]

  template <class Add>
  HOST_DEVICE void operator()(int64_t i, const Add& add) const {
    for (int axis = 0; axis < 2; ++axis) {
      const int32_t edge = edges[2 * i + axis] - 1;
      const T blend = blends[2 * i + axis];
      if (edge < 0 || blend == 0) continue;
      const int64_t p = i, q = i + (axis ? mesh.width : 1), to = blend < 0 ? p : q;
      const Pixel at = pixel_of(i, mesh.height, mesh.width);
      const int32_t *v = mesh.faces + edge / 3 * 3, k = edge % 3;
      const int32_t vertex[2] = {v[(k + 1) % 3], v[(k + 2) % 3]};
      const int64_t first = at.view * mesh.vertices;
      if (!add.wants(first + vertex[0]) && !add.wants(first + vertex[1])) continue;
      double g = 0;
      for (int64_t c = 0; c < channels; ++c) {
        g += static_cast<double>(grad[to * channels + c]) * (colour[p * channels + c] - colour[q * channels + c]);
      }
      if (g != 0) spread(at, axis, vertex, g, add);
    }
  }

 private:
  template <class Add>
  HOST_DEVICE void spread(const Pixel& at, int axis, const int32_t* vertex, double g, const Add& add) const {
    double along[2], across[2];
    Corner corner[2];
    for (int end = 0; end < 2; ++end) {
      corner[end] = mesh.corner(at.view, vertex[end]);
      const double x = corner[end].x / corner[end].w - (at.column + 0.5);
      const double y = corner[end].y / corner[end].w - (at.row + 0.5);
      along[end] = axis ? y : x;
      across[end] = axis ? x : y;
    }
    const double rise = across[1] - across[0], slope = (along[1] - along[0]) / rise;
    for (int end = 0; end < 2; ++end) {
      const int64_t row = at.view * mesh.vertices + vertex[end];
      if (!add.wants(row)) continue;
      const double g_along = g * (end ? -across[0] : across[1]) / rise, g_across = -slope * g_along;
      const double gx = axis ? g_across : g_along, gy = axis ? g_along : g_across;  // by column and row
      const Corner& p = corner[end];
      add(4 * row, static_cast<T>(gx * (0.5 * mesh.width) / p.w));
      add(4 * row + 1, static_cast<T>(-gy * (0.5 * mesh.height) / p.w));
      const double to_w = gx * (0.5 * mesh.width - p.x / p.w) + gy * (0.5 * mesh.height - p.y / p.w);
      add(4 * row + 3, static_cast<T>(to_w / p.w));
    }
  }
};

}  // namespace somnium::rasterizer
