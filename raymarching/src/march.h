// The bodies of the ray marcher, one ray or one cell each: the only copy of this arithmetic.
#pragma once

#include <cstring>

#include "platform.h"

namespace somnium::raymarching {

constexpr int max_cascades = 16;
constexpr int worth_a_jump = 4;  // intervals; across fewer, looking at each is quicker than finding the way out

template <class T>
HOST_DEVICE T clamp(T value, T low, T high) {
  return value < low ? low : (value > high ? high : value);
}

// Distances at which a ray enters and leaves a box; infinite both for a miss. A component of 0 needs no division: the
// ray stays between those two planes for ever, or never is.
template <class T>
HOST_DEVICE void near_far(const T* origin, const T* direction, const T* aabb, T min_near, T* near, T* far) {
  const T infinity = static_cast<T>(INFINITY);
  T enter = -infinity, leave = infinity;
  for (int axis = 0; axis < 3; ++axis) {
    const T low = aabb[axis] - origin[axis], high = aabb[axis + 3] - origin[axis];
    if (direction[axis] == 0) {
      if (!(low <= 0 && high >= 0)) leave = -infinity;
      continue;
    }
    const T a = low / direction[axis], b = high / direction[axis];
    enter = std::fmax(enter, a < b ? a : b);
    leave = std::fmin(leave, a < b ? b : a);
  }
  enter = std::fmax(enter, min_near);
  *near = enter <= leave ? enter : infinity;
  *far = enter <= leave ? leave : infinity;
}

HOST_DEVICE uint32_t spread_bits(uint32_t x) {
  x = (x | x << 16) & 0x030000FF;
  x = (x | x << 8) & 0x0300F00F;
  x = (x | x << 4) & 0x030C30C3;
  return (x | x << 2) & 0x09249249;
}

HOST_DEVICE uint32_t gather_bits(uint32_t x) {
  x &= 0x09249249;
  x = (x | x >> 2) & 0x030C30C3;
  x = (x | x >> 4) & 0x0300F00F;
  x = (x | x >> 8) & 0x030000FF;
  return (x | x >> 16) & 0x000003FF;
}

// One bit per axis in turn, x lowest. So 2^3 cells are a byte, 4^3 a 64-bit word and 8^3 eight words of a bitfield.
HOST_DEVICE uint32_t morton(uint32_t x, uint32_t y, uint32_t z) {
  return spread_bits(x) | spread_bits(y) << 1 | spread_bits(z) << 2;
}

template <class T>
HOST_DEVICE uint8_t pack_byte(const T* cells, T threshold) {
  unsigned byte = 0;
  for (int bit = 0; bit < 8; ++bit) byte |= static_cast<unsigned>(cells[bit] > threshold) << bit;
  return static_cast<uint8_t>(byte);
}

// The bitfield of a grid whose cells are bricks of 8^3 cells: bit i tells whether anything is occupied in `words` 8 i to
// 8 i + 7. So its words stand for 32^3 cells.
HOST_DEVICE uint64_t brick_word(const uint64_t* words, int64_t bricks) {
  uint64_t result = 0;
  for (int64_t brick = 0; brick < bricks; ++brick) {
    uint64_t any = 0;
    for (int i = 0; i < 8; ++i) any |= words[8 * brick + i];
    result |= static_cast<uint64_t>(any != 0) << brick;
  }
  return result;
}

// The edge of the largest of the blocks 1, 2^3, 4^3 around a bit that has nothing set in its word; 0 if the bit is set.
HOST_DEVICE uint32_t empty_block(uint64_t word, uint32_t bit) {
  if (word == 0) return 4;
  if ((word >> (bit & 56) & 0xff) == 0) return 2;
  return word >> (bit & 63) & 1 ? 0 : 1;
}

// The exponent e of value = f 2^e with f in [1/2, 1); for zero something negative.
HOST_DEVICE int exponent(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<int>(bits >> 23 & 0xff) - 126;
}
HOST_DEVICE int exponent(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<int>(bits >> 52 & 0x7ff) - 1022;
}

template <class T>
struct Ray {
  T origin[3], direction[3];
  T near, far;
  T noise;  // where in its interval the first sample's lattice begins; 1/2 fills [near, far]
};

// The intervals that a ray is cut into: clamp(gamma t, dt_min, dt_max) long where they start at t. The number of
// intervals up to t is linear, then logarithmic, then linear in t, so any of them is found without the ones before.
template <class T>
struct Lattice {
  T dt_min, dt_max, gamma;
  T per_dt;  // 1 / dt_min
  T rate, t_low, t_high, n_low, n_high;

  HOST_DEVICE T count(T t) const {
    if (t < t_low) return t * per_dt;
    if (t < t_high) return n_low + std::log(t / t_low) / rate;
    return n_high + (t - t_high) / dt_max;
  }
  HOST_DEVICE T distance(T n) const {
    if (n < n_low) return n * dt_min;
    if (n < n_high) return t_low * std::exp((n - n_low) * rate);
    return t_high + (n - n_high) * dt_max;
  }
  // The ray's own place on the lattice, which the two functions below want.
  HOST_DEVICE T start(const Ray<T>& ray) const { return gamma == 0 ? ray.noise : count(ray.near) + ray.noise - T(0.5); }

  HOST_DEVICE void interval(const Ray<T>& ray, T start, int32_t index, T* middle, T* dt) const {
    if (gamma == 0) {
      *middle = ray.near + (index + start) * dt_min;
      *dt = dt_min;
    } else {
      const T low = distance(start + index), high = distance(start + index + 1);
      *middle = (low + high) / 2;
      *dt = high - low;
    }
  }
  // The last interval whose middle lies before `t`, or one or two earlier: a lower bound that rounding cannot break.
  HOST_DEVICE int32_t last_before(const Ray<T>& ray, T start, T t) const {
    return static_cast<int32_t>(gamma == 0 ? (t - ray.near) * per_dt - start : count(t) - start - 1);
  }
};

template <class T>
struct Grid {
  const uint64_t* words;  // the bitfield
  const uint64_t* bricks;  // brick_word of every 64 words
  int32_t cascades, size;
  int64_t words_per_cascade, bricks_per_cascade;
  T bound;
  T box[max_cascades], cell[max_cascades], per_cell[max_cascades];  // half size; size of a cell and its inverse

  HOST_DEVICE int clamp_level(int level) const { return level < 0 ? 0 : (level < cascades ? level : cascades - 1); }
};

// Walks along the ray's lattice from interval `index` and calls emit(index, position, middle, dt) for every interval whose
// middle lies in an occupied cell, at most `room` times. Returns the next such interval, -1 if there is none; without
// `peek` it does not look for one.
//
// In an empty cell it steps over the largest empty block of 1, 2^3, 4^3 ... 32^3 cells around it. A block is convex and
// all its points see the same cascade (`single` checks), hence nothing occupied can lie in between.
template <class T, class Emit>
HOST_DEVICE int32_t march(const Grid<T>& grid, const Lattice<T>& lattice, const Ray<T>& ray, int32_t index,
                          int32_t room, bool peek, const Emit& emit) {
  if (!(ray.near < ray.far && ray.far < static_cast<T>(INFINITY)) || index < 0) return -1;
  const T start = lattice.start(ray);
  T slope[3], never[3];  // 1 / direction; infinity where the ray never leaves through that side
  for (int axis = 0; axis < 3; ++axis) {
    const bool parallel = ray.direction[axis] == 0;
    slope[axis] = parallel ? 0 : 1 / ray.direction[axis];
    never[axis] = parallel ? static_cast<T>(INFINITY) : 0;
  }
  for (;;) {
    if (room == 0 && !peek) return -1;
    T middle, dt, position[3];
    lattice.interval(ray, start, index, &middle, &dt);
    if (!(middle < ray.far)) return -1;
    for (int axis = 0; axis < 3; ++axis) {
      position[axis] = clamp(ray.origin[axis] + middle * ray.direction[axis], -grid.bound, grid.bound);
    }

    int level = 0, level_of_dt = 0;
    if (grid.cascades > 1) {
      const T outermost =
          std::fmax(std::fmax(std::fabs(position[0]), std::fabs(position[1])), std::fabs(position[2]));
      level_of_dt = grid.clamp_level(exponent(dt * (grid.size / 2)));
      const int level_of_position = grid.clamp_level(exponent(outermost));
      level = level_of_position > level_of_dt ? level_of_position : level_of_dt;
    }
    uint32_t cell[3];
    for (int axis = 0; axis < 3; ++axis) {
      const T place = position[axis] * grid.per_cell[level] + T(grid.size / 2);
      const int32_t rounded = place > 0 ? static_cast<int32_t>(place) : 0;
      cell[axis] = rounded < grid.size ? rounded : grid.size - 1;
    }
    const uint32_t bit = morton(cell[0], cell[1], cell[2]);
    uint32_t block = 8 * empty_block(grid.bricks[level * grid.bricks_per_cascade + (bit >> 15)], bit >> 9);
    if (block == 0) {
      block = empty_block(grid.words[level * grid.words_per_cascade + (bit >> 6)], bit);
      if (block == 0) {
        if (room == 0) return index;
        --room;
        emit(index, position, middle, dt);
        ++index;
        continue;
      }
    } else if (block > static_cast<uint32_t>(grid.size)) {
      block = grid.size;
    }
    if (block * grid.cell[level] < worth_a_jump * dt) {
      ++index;
      continue;
    }
    T leave = ray.far, nearest = 0;
    for (int axis = 0; axis < 3; ++axis) {
      const uint32_t low = cell[axis] & ~(block - 1);
      const T face = (low + (ray.direction[axis] > 0 ? block : 0)) * grid.cell[level] - grid.box[level];
      const T through = (face - ray.origin[axis]) * slope[axis] + never[axis];
      leave = through < leave ? through : leave;
    }
    int32_t next = lattice.last_before(ray, start, leave);
    if (grid.cascades > 1 && next > index + 1) {
      // The cascade may differ within the block if dt grows, or if the block reaches into a finer cascade's box.
      T later, later_dt;
      lattice.interval(ray, start, next, &later, &later_dt);
      bool single = grid.clamp_level(exponent(later_dt * (grid.size / 2))) == level_of_dt;
      if (level > level_of_dt) {
        for (int axis = 0; axis < 3; ++axis) {
          const T low = (cell[axis] & ~(block - 1)) * grid.cell[level] - grid.box[level];
          const T high = low + block * grid.cell[level];
          nearest = std::fmax(nearest, std::fmax(low, -high));
        }
        single = single && nearest >= static_cast<T>(1 << (level - 1));
      }
      if (!single) next = index + 1;
    }
    index = next > index ? next : index + 1;
  }
}

}  // namespace somnium::raymarching
