// Short vectors in the compiler's own extension: one lane per point, so that a body written for one point runs on many.
#pragma once

#include <cstring>

#include "platform.h"

namespace somnium {

#if defined(__AVX512F__)
constexpr int lane_bytes = 64;
#elif defined(__AVX__)
constexpr int lane_bytes = 32;
#else
constexpr int lane_bytes = 16;
#endif

constexpr int float_lanes = lane_bytes / sizeof(float);
constexpr int double_lanes = lane_bytes / sizeof(double);

typedef float Floats __attribute__((vector_size(lane_bytes)));
typedef double Doubles __attribute__((vector_size(lane_bytes)));

template <>
struct Lane<Floats> {
  typedef int32_t Int __attribute__((vector_size(lane_bytes)));
  typedef uint32_t Index __attribute__((vector_size(lane_bytes)));
  static constexpr int count = float_lanes;
};

template <>
struct Lane<Doubles> {
  typedef int32_t Int __attribute__((vector_size(lane_bytes / 2)));
  typedef uint32_t Index __attribute__((vector_size(lane_bytes / 2)));
  static constexpr int count = double_lanes;
};

#define SOMNIUM_CONVERT(To, From)                 \
  template <>                                     \
  inline To convert<To, From>(From value) {       \
    return __builtin_convertvector(value, To);    \
  }
SOMNIUM_CONVERT(Lane<Floats>::Int, Floats)
SOMNIUM_CONVERT(Lane<Doubles>::Int, Doubles)
SOMNIUM_CONVERT(Floats, Lane<Floats>::Int)
SOMNIUM_CONVERT(Doubles, Lane<Doubles>::Int)
SOMNIUM_CONVERT(Lane<Floats>::Index, Lane<Floats>::Int)
SOMNIUM_CONVERT(Lane<Doubles>::Index, Lane<Doubles>::Int)
#undef SOMNIUM_CONVERT

// The vector type that holds one scalar of type T per lane.
template <class T>
struct LanesOf;
template <>
struct LanesOf<float> {
  using Type = Floats;
};
template <>
struct LanesOf<double> {
  using Type = Doubles;
};

// A vector from and to consecutive memory, aligned or not.
template <class V, class T>
inline V load(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

template <class V, class T>
inline void store(T* to, V value) {
  std::memcpy(to, &value, sizeof(V));
}

}  // namespace somnium
