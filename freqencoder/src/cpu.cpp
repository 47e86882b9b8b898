// CPU loops: blocks of points, one lane per coordinate; rows are transposed through a small buffer that stays in cache.
#include "kernel.h"

#include <cstring>
#include <vector>

#include "lanes.h"
#include "parallel.h"

namespace somnium::freqencoder {
namespace {

// sin and cos of `angle`, to about 1 ulp of float for |angle| < 8192: reduction by pi/2 in three exact parts, then
// minimax polynomials on [-pi/4, pi/4]. Beyond that (or for NaN) the library's functions, lane by lane.
SineCosine<Floats> sine_cosine(Floats angle) {
  using Int = Lane<Floats>::Int;
  const Floats magnitude = angle < 0.0f ? -angle : angle;
  const Int large = ~(magnitude < 8192.0f);
  const Floats rounder = Floats{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const Floats quarter = (angle * 0.63661977f + rounder) - rounder;
  Floats r = angle - quarter * 1.5703125f;
  r = r - quarter * 4.837512969970703e-4f;
  r = r - quarter * 7.549789954891882e-8f;
  const Floats z = r * r;
  const Floats s = r + r * z * ((-1.9516545e-4f * z + 8.3321780e-3f) * z - 1.6666655e-1f);
  const Floats c = 1.0f - 0.5f * z + z * z * ((2.4438090e-5f * z - 1.3887364e-3f) * z + 4.1666647e-2f);
  const Int q = convert<Int>(quarter);
  const Floats sine = (q & 1) == 1 ? c : s;
  const Floats cosine = (q & 1) == 1 ? s : c;
  SineCosine<Floats> wave = {(q & 2) == 2 ? -sine : sine, ((q + 1) & 2) == 2 ? -cosine : cosine};
  int any = 0;
  for (int i = 0; i < float_lanes; ++i) any |= large[i];
  if (any) {
    for (int i = 0; i < float_lanes; ++i) {
      if (!large[i]) continue;
      wave.sine[i] = std::sin(angle[i]);
      wave.cosine[i] = std::cos(angle[i]);
    }
  }
  return wave;
}

SineCosine<Doubles> sine_cosine(Doubles angle) {
  SineCosine<Doubles> wave;
  for (int i = 0; i < double_lanes; ++i) {
    wave.sine[i] = std::sin(angle[i]);
    wave.cosine[i] = std::cos(angle[i]);
  }
  return wave;
}

// The wave of band k, given that of band k - 1: every other band by the double angle, which costs one more ulp and no
// polynomial.
template <class V, class T>
SineCosine<V> next_wave(int k, T frequency, V position, SineCosine<V> before) {
  if (k % 2 == 0 || sizeof(T) > sizeof(float)) return sine_cosine(frequency * position);
  return {2 * before.sine * before.cosine, 1 - 2 * before.sine * before.sine};
}

// Copies `points` rows of `columns` runs of D values between rows (stride `width`) and columns (stride `lane_stride`).
template <bool to_rows, int D, class T>
void transpose(T* rows, T* lanes, int64_t points, int64_t columns, int64_t dims, int64_t width, int64_t lane_stride) {
  const int64_t run = D ? D : dims;
  for (int64_t point = 0; point < points; ++point) {
    for (int64_t column = 0; column < columns; ++column) {
      T* row = rows + point * width + column * run;
      T* lane = lanes + column * lane_stride + point * run;
      std::memcpy(to_rows ? row : lane, to_rows ? lane : row, run * sizeof(T));
    }
  }
}

template <bool to_rows, class T>
void transpose(T* rows, T* lanes, int64_t points, int64_t columns, const Shape& shape, int64_t lane_stride) {
  const auto move = shape.dims == 3 ? transpose<to_rows, 3, T> : transpose<to_rows, 0, T>;
  move(rows, lanes, points, columns, shape.dims, shape.width(), lane_stride);
}

// A block is as many points as there are lanes, so that its coordinates fill `dims` vectors exactly.
template <class V, class T, class Body>
void for_blocks(const Shape& shape, const Body& body) {
  constexpr int64_t size = Lane<V>::count;
  const int64_t blocks = (shape.count + size - 1) / size;
  parallel_for(blocks, 64, [&](int64_t begin, int64_t end) {
    // columns of the output, then x, direction and result: each `stride` values
    const int64_t stride = size * shape.dims;
    std::vector<T> columns((1 + 2 * shape.degree) * stride), inputs(3 * stride);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * size;
      const int64_t points = shape.count - first < size ? shape.count - first : size;
      body(first, points, stride, columns.data(), inputs.data());
    }
  });
}

}  // namespace

template <class T>
void encode_cpu(const Shape& shape, const T* x, const T* direction, T* out) {
  using V = typename LanesOf<T>::Type;
  const bool value = direction == nullptr;
  for_blocks<V, T>(shape, [&](int64_t first, int64_t points, int64_t stride, T* columns, T* inputs) {
    const int64_t used = points * shape.dims * sizeof(T);
    std::memcpy(inputs, x + first * shape.dims, used);
    if (!value) std::memcpy(inputs + stride, direction + first * shape.dims, used);
    for (int64_t i = 0; i < stride; i += Lane<V>::count) {
      const V position = load<V>(inputs + i);
      const V v = load<V>(inputs + stride + i);
      store(columns + i, value ? position : v);
      T frequency = 1;
      SineCosine<V> wave = {};
      for (int k = 0; k < shape.active; ++k, frequency *= 2) {
        wave = next_wave(k, frequency, position, wave);
        const auto column = band_forward(wave, frequency, v, value);
        store(columns + (1 + 2 * k) * stride + i, column.sine);
        store(columns + (2 + 2 * k) * stride + i, column.cosine);
      }
    }
    T* rows = out + first * shape.width();
    const int64_t written = 1 + 2 * shape.active;
    transpose<true>(rows, columns, points, written, shape, stride);
    for (int64_t point = 0; point < points && shape.active < shape.degree; ++point) {
      std::memset(rows + point * shape.width() + written * shape.dims, 0,
                  (shape.width() - written * shape.dims) * sizeof(T));
    }
  });
}

template <class T>
void input_gradient_cpu(const Shape& shape, const T* grad, const T* x, const T* direction, T* out) {
  using V = typename LanesOf<T>::Type;
  const bool value = direction == nullptr;
  for_blocks<V, T>(shape, [&](int64_t first, int64_t points, int64_t stride, T* columns, T* inputs) {
    const int64_t used = points * shape.dims * sizeof(T);
    std::memcpy(inputs, x + first * shape.dims, used);
    if (!value) std::memcpy(inputs + stride, direction + first * shape.dims, used);
    T* rows = const_cast<T*>(grad + first * shape.width());
    transpose<false>(rows, columns, points, 1 + 2 * shape.active, shape, stride);
    for (int64_t i = 0; i < stride; i += Lane<V>::count) {
      const V position = load<V>(inputs + i);
      V sum = value ? load<V>(columns + i) : V{};
      T frequency = 1;
      SineCosine<V> wave = {};
      for (int k = 0; k < shape.active; ++k, frequency *= 2) {
        wave = next_wave(k, frequency, position, wave);
        const SineCosine<V> g = {load<V>(columns + (1 + 2 * k) * stride + i),
                                 load<V>(columns + (2 + 2 * k) * stride + i)};
        sum += band_gradient(wave, g, frequency, value);
      }
      store(inputs + 2 * stride + i, value ? sum : sum * load<V>(inputs + stride + i));
    }
    std::memcpy(out + first * shape.dims, inputs + 2 * stride, used);
  });
}

template void encode_cpu(const Shape&, const float*, const float*, float*);
template void encode_cpu(const Shape&, const double*, const double*, double*);
template void input_gradient_cpu(const Shape&, const float*, const float*, const float*, float*);
template void input_gradient_cpu(const Shape&, const double*, const double*, const double*, double*);

}  // namespace somnium::freqencoder
