// CPU loops. Pictures are drawn tile by tile, so that depths stay in cache and threads share no pixel. Gradients that many
// pixels add to are split by the rows they go to: no atomics, and the same sums for any number of threads.
#include <algorithm>
#include <optional>
#include <vector>

#include "kernel.h"
#include "parallel.h"

namespace somnium::rasterizer {
namespace {

constexpr int32_t tile = 32;  // pixels per side

struct Grid {
  int32_t rows, columns;
  int64_t count() const { return int64_t(rows) * columns; }

  // Calls body(tile) for the tiles that a box touches.
  template <class Body>
  void for_tiles(const Box& box, const Body& body) const {
    if (box.empty()) return;
    for (int32_t row = box.y0 / tile; row <= box.y1 / tile; ++row) {
      for (int32_t column = box.x0 / tile; column <= box.x1 / tile; ++column) body(int64_t(row) * columns + column);
    }
  }
};

// The faces that may be seen in each tile, in order: those of tile i are faces[first[i]] .. faces[first[i + 1] - 1].
struct Bins {
  std::vector<int64_t> first;
  std::vector<int32_t> faces;
};

template <class T>
Bins sort_into_tiles(const Mesh<T>& mesh, const std::vector<Corner>& corners, const Grid& grid,
                     std::vector<Box>& boxes) {
  const int64_t chunks = std::min<int64_t>(16, mesh.face_count / 1024 + 1);
  const int64_t length = (mesh.face_count + chunks - 1) / chunks;
  std::vector<std::vector<int64_t>> places(chunks);  // of each chunk in each tile: first counts, then the next place
  const auto end_of = [&](int64_t chunk) { return std::min((chunk + 1) * length, mesh.face_count); };
  parallel_tasks(chunks, [&](int64_t chunk) {
    places[chunk].assign(grid.count(), 0);
    for (int64_t face = chunk * length; face < end_of(chunk); ++face) {
      boxes[face] = {0, 0, -1, -1};
      if (!mesh.known(face)) continue;
      const int32_t* v = mesh.faces + 3 * face;
      const Corner p[3] = {corners[v[0]], corners[v[1]], corners[v[2]]};
      if (!finite(p[0]) || !finite(p[1]) || !finite(p[2])) continue;
      boxes[face] = box_of(p, mesh.height, mesh.width);
      grid.for_tiles(boxes[face], [&](int64_t at) { ++places[chunk][at]; });
    }
  });
  Bins bins;
  bins.first.resize(grid.count() + 1);
  int64_t total = 0;
  for (int64_t at = 0; at < grid.count(); ++at) {
    bins.first[at] = total;
    for (auto& place : places) {
      const int64_t count = place[at];
      place[at] = total;
      total += count;
    }
  }
  bins.first[grid.count()] = total;
  bins.faces.resize(total);
  parallel_tasks(chunks, [&](int64_t chunk) {
    for (int64_t face = chunk * length; face < end_of(chunk); ++face) {
      grid.for_tiles(boxes[face],
                     [&](int64_t at) { bins.faces[places[chunk][at]++] = static_cast<int32_t>(face); });
    }
  });
  return bins;
}

// Whether a triangle misses a box of pixels: one of its edges has all their centres outside.
bool misses(const Triangle& triangle, const Box& box) {
  for (int k = 0; k < 3; ++k) {
    const double column = (triangle.A[k] > 0 ? box.x1 : box.x0) + 0.5;
    const double row = (triangle.B[k] > 0 ? box.y1 : box.y0) + 0.5;
    if (multiply_add(triangle.A[k], column, multiply_add(triangle.B[k], row, triangle.C[k])) < 0) return true;
  }
  return false;
}

struct Tile {
  Box area;
  float depth[tile * tile];
  int32_t face[tile * tile];

  // Faces come in order, so that of two at the same depth the first one stays.
  void draw(const Triangle& triangle, const Box& whole, int32_t number) {
    const Box box = {std::max(whole.x0, area.x0), std::max(whole.y0, area.y0), std::min(whole.x1, area.x1),
                     std::min(whole.y1, area.y1)};
    if (box.x1 - box.x0 > 4 && misses(triangle, box)) return;
    for (int32_t y = box.y0; y <= box.y1; ++y) {
      double start[3];
      for (int k = 0; k < 3; ++k) start[k] = multiply_add(triangle.B[k], y + 0.5, triangle.C[k]);
      const int32_t line = (y - area.y0) * tile - area.x0;
      for (int32_t x = box.x0; x <= box.x1; ++x) {
        double a[3];
        for (int k = 0; k < 3; ++k) a[k] = multiply_add(triangle.A[k], x + 0.5, start[k]);
        if (!inside(a)) continue;
        const float z = triangle.rounded_depth(a);
        if (z >= -1 && z <= 1 && z < depth[line + x]) {
          depth[line + x] = z;
          face[line + x] = number;
        }
      }
    }
  }
};

}  // namespace

template <class T>
void rasterize_cpu(const Mesh<T>& mesh, int64_t views, T* raster, T* slopes) {
  const Grid grid = {(mesh.height + tile - 1) / tile, (mesh.width + tile - 1) / tile};
  const int64_t pixels = int64_t(mesh.height) * mesh.width;
  std::vector<Corner> corners(mesh.vertices);
  std::vector<Box> boxes(mesh.face_count);
  for (int64_t view = 0; view < views; ++view) {
    parallel_for(mesh.vertices, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) corners[i] = mesh.corner(view, static_cast<int32_t>(i));
    });
    const Bins bins = sort_into_tiles(mesh, corners, grid, boxes);
    parallel_tasks(grid.count(), [&](int64_t at) {
      Tile picture;
      const int32_t y = static_cast<int32_t>(at / grid.columns) * tile;
      const int32_t x = static_cast<int32_t>(at % grid.columns) * tile;
      picture.area = {x, y, std::min(x + tile, mesh.width) - 1, std::min(y + tile, mesh.height) - 1};
      std::fill(picture.depth, picture.depth + tile * tile, 2.0f);
      std::fill(picture.face, picture.face + tile * tile, -1);
      for (int64_t i = bins.first[at]; i < bins.first[at + 1]; ++i) {
        const int32_t face = bins.faces[i], *v = mesh.faces + 3 * int64_t(face);
        const Corner p[3] = {corners[v[0]], corners[v[1]], corners[v[2]]};
        Triangle triangle;
        if (prepare(p, &triangle)) picture.draw(triangle, boxes[face], face);
      }
      std::optional<Shader<T>> shader;  // neighbours often show the same face
      for (int32_t row = y; row <= picture.area.y1; ++row) {
        for (int32_t column = x; column <= picture.area.x1; ++column) {
          const int64_t pixel = 4 * (view * pixels + int64_t(row) * mesh.width + column);
          const int32_t face = picture.face[(row - y) * tile + column - x];
          if (face >= 0) {
            if (!shader || shader->face != face) shader.emplace(mesh, view, face);
            (*shader)(row, column, raster + pixel, slopes ? slopes + pixel : nullptr);
            continue;
          }
          for (int k = 0; k < 4; ++k) raster[pixel + k] = 0;
          for (int k = 0; k < 4 && slopes; ++k) slopes[pixel + k] = 0;
        }
      }
    });
  }
}

template <class Body>
void run_cpu(const Body& body) {
  parallel_for(body.items, 1024, [&body](int64_t begin, int64_t end) {
    const Body local = body;  // nobody else can change it, so its fields stay in registers
    for (int64_t i = begin; i < end; ++i) local(i);
  });
}

namespace {

// Adds to the rows of one task only; every task sees all items, in order.
template <class T>
struct Owned {
  T* values;
  int64_t begin, end;
  bool wants(int64_t row) const { return row >= begin && row < end; }
  void operator()(int64_t at, T value) const { values[at] += value; }
};

}  // namespace

template <class Body>
void add_cpu(const Body& body) {
  const auto target = body.target;
  if (target.groups == 0) return;
  const int64_t rows = target.rows / target.groups, items = body.items / target.groups;
  const int64_t parts = (thread_count() + target.groups - 1) / target.groups, length = (rows + parts - 1) / parts;
  parallel_tasks(target.groups * parts, [&](int64_t task) {
    const Body local = body;
    const int64_t group = task / parts, first = task % parts * length;
    const Owned<std::remove_reference_t<decltype(*target.values)>> add = {
        target.values, group * rows + first, group * rows + std::min(first + length, rows)};
    for (int64_t i = group * items; i < (group + 1) * items; ++i) local(i, add);
  });
}

void edges_cpu(const int32_t* faces, int64_t face_count, int32_t* ring) {
  struct Edge {
    int32_t high, number;  // the larger vertex, 3 face + k
  };
  const int64_t count = 3 * face_count;
  int32_t largest = -1;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, faces[i]);
  const auto ends = [faces](int64_t i) {
    const int64_t face = i / 3, k = i % 3;
    return std::minmax(faces[3 * face + (k + 1) % 3], faces[3 * face + (k + 2) % 3]);
  };
  const auto proper = [faces](int64_t i) {
    const int32_t* v = faces + i / 3 * 3;
    return v[0] != v[1] && v[1] != v[2] && v[2] != v[0] && v[0] >= 0 && v[1] >= 0 && v[2] >= 0;
  };
  // Counting sort by the smaller vertex, then by the larger one among the few that share it.
  std::vector<int64_t> first(static_cast<int64_t>(largest) + 2, 0);
  for (int64_t i = 0; i < count; ++i) {
    if (proper(i)) ++first[ends(i).first + 1];
  }
  for (int64_t vertex = 0; vertex <= largest; ++vertex) first[vertex + 1] += first[vertex];
  std::vector<int64_t> place = first;
  std::vector<Edge> edges(first[largest + 1]);
  for (int64_t i = 0; i < count; ++i) {
    ring[i] = static_cast<int32_t>(i);
    if (!proper(i)) continue;
    const auto [low, high] = ends(i);
    edges[place[low]++] = {high, static_cast<int32_t>(i)};
  }
  parallel_for(static_cast<int64_t>(largest) + 1, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t vertex = begin; vertex < end; ++vertex) {
      Edge *from = edges.data() + first[vertex], *to = edges.data() + first[vertex + 1];
      std::sort(from, to, [](Edge a, Edge b) { return a.high != b.high ? a.high < b.high : a.number < b.number; });
      for (Edge* start = from; start < to;) {
        Edge* stop = start + 1;
        for (; stop < to && stop->high == start->high; ++stop) ring[(stop - 1)->number] = stop->number;
        ring[(stop - 1)->number] = start->number;
        start = stop;
      }
    }
  });
}

template void rasterize_cpu(const Mesh<float>&, int64_t, float*, float*);
template void rasterize_cpu(const Mesh<double>&, int64_t, double*, double*);

#define SOMNIUM_RUN_CPU(...) template void run_cpu(const __VA_ARGS__&);
#define SOMNIUM_ADD_CPU(...) template void add_cpu(const __VA_ARGS__&);
SOMNIUM_RASTERIZER_RUN(SOMNIUM_RUN_CPU)
SOMNIUM_RASTERIZER_ADD(SOMNIUM_ADD_CPU)

}  // namespace somnium::rasterizer
