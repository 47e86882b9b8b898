// Real spherical harmonics and their gradient: the arithmetic for one direction, or for one per lane.
//
// The function of degree l and order m is norm(l, m) P(z) Re (x + iy)^m, or Im for -m, where P is the m-th derivative of
// the Legendre polynomial of degree l. P has a recurrence of two terms in l, the power one of one term in m, so nothing
// is tabulated; the loops are unrolled by templates and the constants computed by the compiler.
#pragma once

#include "platform.h"

namespace somnium::shencoder {

// Arrays are row-major: x, direction [count, 3]; outputs and their gradients [count, degree^2].
struct Shape {
  int64_t count;
  int degree;
  HOST_DEVICE int64_t width() const { return int64_t(degree) * degree; }
};

constexpr int max_degree = 8;

// direction may be null; with it the derivative along it is written instead of the value.
template <class T>
void encode_cpu(const Shape& shape, const T* x, const T* direction, T* out);
template <class T>
const char* encode_cuda(const Shape& shape, const T* x, const T* direction, T* out, void* stream);

// out[count, 3]: gradient of <grad, encoding> in x; with a direction, that gradient's derivative along it.
template <class T>
void input_gradient_cpu(const Shape& shape, const T* grad, const T* x, const T* direction, T* out);
template <class T>
const char* input_gradient_cuda(const Shape& shape, const T* grad, const T* x, const T* direction, T* out,
                                void* stream);

// A value and its derivative along a direction: what turns a body into its directional derivative.
template <class V>
struct Dual {
  V value, slope;
};
template <class V>
HOST_DEVICE Dual<V> operator+(Dual<V> a, Dual<V> b) {
  return {a.value + b.value, a.slope + b.slope};
}
template <class V>
HOST_DEVICE Dual<V> operator-(Dual<V> a, Dual<V> b) {
  return {a.value - b.value, a.slope - b.slope};
}
template <class V>
HOST_DEVICE Dual<V> operator*(Dual<V> a, Dual<V> b) {
  return {a.value * b.value, a.value * b.slope + a.slope * b.value};
}
template <class V, class Constant>
HOST_DEVICE Dual<V> operator*(Constant a, Dual<V> b) {
  return {a * b.value, a * b.slope};
}

// The square root, for the compiler to compute.
HOST_DEVICE constexpr double root(double square) {
  double x = square > 1 ? square : 1;
  for (int i = 0; i < 60; ++i) x = (x + square / x) / 2;
  return x;
}

// Gives the function unit length on the sphere, and its sign (-1)^m.
HOST_DEVICE constexpr double norm(int l, int m) {
  double square = (2 * l + 1) / (4 * 3.14159265358979323846) * (m ? 2 : 1);
  for (int k = l - m + 1; k <= l + m; ++k) square /= k;
  return m % 2 ? -root(square) : root(square);
}

HOST_DEVICE constexpr double double_factorial(int n) { return n > 1 ? n * double_factorial(n - 2) : 1; }

// T is float or double; V is T, a vector of them, or a Dual of either. P for l and for l - 1.
template <class T, int degree, int l, int m, class V, class Store>
HOST_DEVICE void write_degrees(V z, V previous, V legendre, V real, V imaginary, const Store& store) {
  constexpr T scale = static_cast<T>(norm(l, m));
  const V scaled = scale * legendre;
  store(l * l + l + m, scaled * real);
  if constexpr (m > 0) store(l * l + l - m, scaled * imaginary);
  if constexpr (l + 1 < degree) {
    constexpr T a = static_cast<T>(2 * l + 1) / (l + 1 - m), b = static_cast<T>(l + m) / (l + 1 - m);
    const V next = a * (z * legendre) - b * previous;
    write_degrees<T, degree, l + 1, m>(z, legendre, next, real, imaginary, store);
  }
}

// Calls store(index, value) for every column, order by order; real + i imaginary = (x + iy)^m.
template <class T, int degree, int m, class V, class Store>
HOST_DEVICE void write_orders(V x, V y, V z, V one, V real, V imaginary, const Store& store) {
  constexpr T diagonal = static_cast<T>(double_factorial(2 * m - 1));
  write_degrees<T, degree, m, m>(z, one - one, diagonal * one, real, imaginary, store);
  if constexpr (m + 1 < degree) {
    write_orders<T, degree, m + 1>(x, y, z, one, x * real - y * imaginary, x * imaginary + y * real, store);
  }
}

// Adds to `even` and `odd` the sums over l of norm g P that stand before Re and Im (x + iy)^m, to *_slope those of P'.
template <class T, int degree, int l, int m, class V, class Load>
HOST_DEVICE void sum_degrees(V z, V previous, V legendre, V previous_slope, V slope, V* even, V* odd, V* even_slope,
                             V* odd_slope, const Load& load) {
  constexpr T scale = static_cast<T>(norm(l, m));
  const auto grad = scale * load(l * l + l + m);
  *even = *even + grad * legendre;
  *even_slope = *even_slope + grad * slope;
  if constexpr (m > 0) {
    const auto mirrored = scale * load(l * l + l - m);
    *odd = *odd + mirrored * legendre;
    *odd_slope = *odd_slope + mirrored * slope;
  }
  if constexpr (l + 1 < degree) {
    constexpr T a = static_cast<T>(2 * l + 1) / (l + 1 - m), b = static_cast<T>(l + m) / (l + 1 - m);
    const V next = a * (z * legendre) - b * previous;
    const V next_slope = a * (legendre + z * slope) - b * previous_slope;
    sum_degrees<T, degree, l + 1, m>(z, legendre, next, slope, next_slope, even, odd, even_slope, odd_slope, load);
  }
}

// Adds the gradient in (x, y, z) of the sum of load(index) times column. (lower_real, lower_imaginary) is the power m - 1.
template <class T, int degree, int m, class V, class Load>
HOST_DEVICE void sum_orders(V x, V y, V z, V one, V real, V imaginary, V lower_real, V lower_imaginary, V* sum,
                            const Load& load) {
  constexpr T diagonal = static_cast<T>(double_factorial(2 * m - 1));
  const V zero = one - one;
  V even = zero, odd = zero, even_slope = zero, odd_slope = zero;
  sum_degrees<T, degree, m, m>(z, zero, diagonal * one, zero, zero, &even, &odd, &even_slope, &odd_slope, load);
  sum[2] = sum[2] + even_slope * real + odd_slope * imaginary;
  if constexpr (m > 0) {
    constexpr T order = m;
    sum[0] = sum[0] + order * (even * lower_real + odd * lower_imaginary);
    sum[1] = sum[1] + order * (odd * lower_real - even * lower_imaginary);
  }
  if constexpr (m + 1 < degree) {
    sum_orders<T, degree, m + 1>(x, y, z, one, x * real - y * imaginary, x * imaginary + y * real, real, imaginary,
                                 sum, load);
  }
}

// The columns at p, or with `along` their derivatives along it.
template <class T, int degree, class V, class Store>
HOST_DEVICE void encode(const V* p, const V* along, const Store& store) {
  const V one = V{} + T(1);
  if (along) {
    const Dual<V> x = {p[0], along[0]}, y = {p[1], along[1]}, z = {p[2], along[2]}, constant = {one, V{}};
    const auto store_slope = [&store](int index, Dual<V> column) { store(index, column.slope); };
    write_orders<T, degree, 0>(x, y, z, constant, constant, constant - constant, store_slope);
  } else {
    write_orders<T, degree, 0>(p[0], p[1], p[2], one, one, V{}, store);
  }
}

// The gradient in p of the sum of load(index) times column, or with `along` that gradient's derivative along it.
template <class T, int degree, class V, class Load>
HOST_DEVICE void input_gradient(const V* p, const V* along, V* out, const Load& load) {
  const V one = V{} + T(1);
  if (along) {
    const Dual<V> x = {p[0], along[0]}, y = {p[1], along[1]}, z = {p[2], along[2]}, constant = {one, V{}};
    const Dual<V> zero = constant - constant;
    Dual<V> sum[3] = {zero, zero, zero};
    sum_orders<T, degree, 0>(x, y, z, constant, constant, zero, zero, zero, sum, load);
    for (int axis = 0; axis < 3; ++axis) out[axis] = sum[axis].slope;
  } else {
    V sum[3] = {V{}, V{}, V{}};
    sum_orders<T, degree, 0>(p[0], p[1], p[2], one, one, V{}, V{}, V{}, sum, load);
    for (int axis = 0; axis < 3; ++axis) out[axis] = sum[axis];
  }
}

// Calls body(integral constant) with the degree.
template <int degree>
struct Degree {
  static constexpr int value = degree;
};
template <class Body, int degree = max_degree>
void with_degree(int wanted, const Body& body, Degree<degree> = {}) {
  if (wanted == degree) return body(Degree<degree>());
  if constexpr (degree > 1) with_degree(wanted, body, Degree<degree - 1>());
}

}  // namespace somnium::shencoder
