// CPU loops: as many directions at once as a vector has lanes, through a small table of columns that stays in cache.
#include "kernel.h"

#include "lanes.h"
#include "parallel.h"

namespace somnium::shencoder {
namespace {

// `points` rows of three numbers to three vectors (further lanes 0), and back.
template <class V, class T>
void load_points(const T* rows, int64_t points, V* columns) {
  for (int axis = 0; axis < 3; ++axis) {
    V column = {};
    for (int64_t i = 0; i < points; ++i) column[i] = rows[3 * i + axis];
    columns[axis] = column;
  }
}

template <class V, class T>
void store_points(T* rows, int64_t points, const V* columns) {
  for (int64_t i = 0; i < points; ++i) {
    for (int axis = 0; axis < 3; ++axis) rows[3 * i + axis] = columns[axis][i];
  }
}

// Calls body(first, points) for blocks of as many points as a vector has lanes.
template <class V, class Body>
void for_blocks(int64_t count, const Body& body) {
  constexpr int64_t size = Lane<V>::count;
  parallel_for((count + size - 1) / size, 64, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * size;
      body(first, count - first < size ? count - first : size);
    }
  });
}

}  // namespace

template <class T>
void encode_cpu(const Shape& shape, const T* x, const T* direction, T* out) {
  using V = typename LanesOf<T>::Type;
  with_degree(shape.degree, [&](auto degree) {
    constexpr int width = degree.value * degree.value;
    for_blocks<V>(shape.count, [=](int64_t first, int64_t points) {
      V p[3], along[3], columns[width];
      load_points(x + 3 * first, points, p);
      if (direction) load_points(direction + 3 * first, points, along);
      const auto store = [&columns](int index, V column) { columns[index] = column; };
      encode<T, degree.value>(p, direction ? along : nullptr, store);
      T* row = out + first * width;
      for (int64_t i = 0; i < points; ++i, row += width) {
        for (int c = 0; c < width; ++c) row[c] = columns[c][i];
      }
    });
  });
}

template <class T>
void input_gradient_cpu(const Shape& shape, const T* grad, const T* x, const T* direction, T* out) {
  using V = typename LanesOf<T>::Type;
  with_degree(shape.degree, [&](auto degree) {
    constexpr int width = degree.value * degree.value;
    for_blocks<V>(shape.count, [=](int64_t first, int64_t points) {
      V p[3], along[3], columns[width], sum[3];
      load_points(x + 3 * first, points, p);
      if (direction) load_points(direction + 3 * first, points, along);
      const T* row = grad + first * width;
      for (int64_t i = 0; i < points; ++i, row += width) {
        for (int c = 0; c < width; ++c) columns[c][i] = row[c];
      }
      const auto load = [&columns](int index) { return columns[index]; };
      input_gradient<T, degree.value>(p, direction ? along : nullptr, sum, load);
      store_points(out + 3 * first, points, sum);
    });
  });
}

template void encode_cpu(const Shape&, const float*, const float*, float*);
template void encode_cpu(const Shape&, const double*, const double*, double*);
template void input_gradient_cpu(const Shape&, const float*, const float*, const float*, float*);
template void input_gradient_cpu(const Shape&, const double*, const double*, const double*, double*);

}  // namespace somnium::shencoder
