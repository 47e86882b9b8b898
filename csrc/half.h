// IEEE half precision as storage: two bytes in memory, float in arithmetic. Bit arithmetic on the CPU, so that any C++
// compiler will do; the hardware's conversions on CUDA.
#pragma once

#include <cstring>

#include "platform.h"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

namespace somnium {

struct Half {
  uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

HOST_DEVICE float widen(Half half) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(half.bits));
#else
  // The exponent is re-biased by a multiplication, which gets subnormal numbers right, too; only inf and NaN differ.
  const uint32_t magnitude = half.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(half.bits & 0x8000u) << 16;
  const uint32_t finite = float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f);
  return bits_to_float(sign | (magnitude >= 0x7c00u ? 0x7f800000u | magnitude << 13 : finite));
#endif
}

// To the nearest half, ties to even; what is too large becomes infinite.
HOST_DEVICE Half narrow_to_half(float value) {
#ifdef __CUDA_ARCH__
  return {__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t bits = float_to_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520: halfway to the first number that is not finite
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: a float whose last bit is worth 2^-24 does the rounding
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(half | (bits >> 16 & 0x8000u))};
#endif
}

// How a number is stored and what it is computed in.
template <class Stored>
struct Storage {
  using Real = Stored;
  static HOST_DEVICE Real get(Stored value) { return value; }
  static HOST_DEVICE Stored put(Real value) { return value; }
};

template <>
struct Storage<Half> {
  using Real = float;
  static HOST_DEVICE float get(Half value) { return widen(value); }
  static HOST_DEVICE Half put(float value) { return narrow_to_half(value); }
};

}  // namespace somnium
