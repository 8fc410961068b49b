// Dense products on panels, the register-blocked building blocks of hstu_attention/cpu.cpp.
//
// A panelled matrix of c columns is stored as ceil(c / kPanel) panels, each [rows][kPanel] and contiguous, zero past
// the last column. One kernel, an outer product over two vectors of columns, then serves every product.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace gr {

constexpr int64_t kBlock = 6;  // rows of a register block

template <class T>
struct Simd {
  static constexpr int64_t kLanes = 32 / sizeof(T);
  static constexpr int64_t kPanel = 2 * kLanes;
  typedef T Vector __attribute__((vector_size(32)));
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
int64_t panels(int64_t columns) {
  return ceil_div(columns, Simd<T>::kPanel);
}

// c[R, vectors] (+)= a[R, depth] * panel[depth, vectors]; Transposed reads a as [depth, R].
template <class T, int R, int kVectors, bool kTransposed, bool kAdd>
void block_product(const T* a, int64_t a_stride, const T* panel, int64_t depth, T* c, int64_t c_stride) {
  using Vector = typename Simd<T>::Vector;
  constexpr int64_t kLanes = Simd<T>::kLanes;
  Vector sum[R][kVectors] = {};
  for (int64_t d = 0; d < depth; ++d) {
    Vector right[kVectors];
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; ++n) std::memcpy(&right[n], panel + d * Simd<T>::kPanel + n * kLanes, sizeof(Vector));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const T left = kTransposed ? a[d * a_stride + r] : a[r * a_stride + d];
#pragma GCC unroll 2
      for (int n = 0; n < kVectors; ++n) sum[r][n] += left * right[n];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; ++n) {
      T* target = c + r * c_stride + n * kLanes;
      Vector value = sum[r][n];
      if (kAdd) {
        Vector old;
        std::memcpy(&old, target, sizeof(old));
        value += old;
      }
      std::memcpy(target, &value, sizeof(value));
    }
  }
}

template <class T, int kVectors, bool kTransposed, bool kAdd>
void product(int64_t rows, const T* a, int64_t a_stride, const T* panel, int64_t depth, T* c, int64_t c_stride) {
  switch (rows) {
    case 1: return block_product<T, 1, kVectors, kTransposed, kAdd>(a, a_stride, panel, depth, c, c_stride);
    case 2: return block_product<T, 2, kVectors, kTransposed, kAdd>(a, a_stride, panel, depth, c, c_stride);
    case 3: return block_product<T, 3, kVectors, kTransposed, kAdd>(a, a_stride, panel, depth, c, c_stride);
    case 4: return block_product<T, 4, kVectors, kTransposed, kAdd>(a, a_stride, panel, depth, c, c_stride);
    case 5: return block_product<T, 5, kVectors, kTransposed, kAdd>(a, a_stride, panel, depth, c, c_stride);
    default: return block_product<T, 6, kVectors, kTransposed, kAdd>(a, a_stride, panel, depth, c, c_stride);
  }
}

// Adds a * b to rows of a panelled matrix. `b` and `c` hold `columns` columns as panels of b_rows and c_rows rows each.
template <class T, bool kTransposed>
void add_product(int64_t rows, const T* a, int64_t a_stride, const T* b, int64_t b_rows, int64_t depth, T* c,
                 int64_t c_rows, int64_t columns) {
  constexpr int64_t kPanel = Simd<T>::kPanel;
  for (int64_t p = 0; p < panels<T>(columns); ++p) {
    const T* panel = b + p * b_rows * kPanel;
    T* target = c + p * c_rows * kPanel;
    if (columns - p * kPanel > Simd<T>::kLanes) {
      product<T, 2, kTransposed, true>(rows, a, a_stride, panel, depth, target, kPanel);
    } else {
      product<T, 1, kTransposed, true>(rows, a, a_stride, panel, depth, target, kPanel);
    }
  }
}

// Rows [count, columns] at `stride` into panels of `panel_rows` rows; columns past the last become zero.
template <class T>
void pack_columns(const T* from, int64_t stride, int64_t count, int64_t columns, T* to, int64_t panel_rows) {
  constexpr int64_t kPanel = Simd<T>::kPanel;
  for (int64_t p = 0; p < panels<T>(columns); ++p) {
    const int64_t width = std::min(kPanel, columns - p * kPanel);
    for (int64_t r = 0; r < count; ++r) {
      T* target = to + (p * panel_rows + r) * kPanel;
      const T* source = from + r * stride + p * kPanel;
      if (width == kPanel) {
        std::memcpy(target, source, kPanel * sizeof(T));
      } else {
        for (int64_t c = 0; c < kPanel; ++c) target[c] = c < width ? source[c] : T(0);
      }
    }
  }
}

// The transpose of rows [count, depth] into panels [count / kPanel][depth][kPanel]; columns past `count` become zero.
template <class T>
void pack_transposed(const T* from, int64_t stride, int64_t count, int64_t depth, T* to) {
  constexpr int64_t kPanel = Simd<T>::kPanel;
  for (int64_t first = 0; first < count; first += kPanel, to += depth * kPanel) {
    const int64_t width = std::min(kPanel, count - first);
    for (int64_t r = 0; r < kPanel; ++r) {
      const T* source = from + (first + r) * stride;
      for (int64_t d = 0; d < depth; ++d) to[d * kPanel + r] = r < width ? source[d] : T(0);
    }
  }
}

// factor * panels (count rows of panels that hold panel_rows) to rows [count, columns] at `stride`.
template <class T>
void unpack(const T* from, int64_t panel_rows, int64_t count, int64_t columns, T factor, T* to, int64_t stride) {
  constexpr int64_t kPanel = Simd<T>::kPanel;
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t p = 0; p < panels<T>(columns); ++p) {
      const T* source = from + (p * panel_rows + r) * kPanel;
      T* target = to + r * stride + p * kPanel;
      const int64_t width = std::min(kPanel, columns - p * kPanel);
      for (int64_t c = 0; c < width; ++c) target[c] = factor * source[c];
    }
  }
}

// Adds the first row of panels to a row of `columns`.
template <class T>
void add_unpacked(const T* from, int64_t panel_rows, int64_t columns, T* to) {
  constexpr int64_t kPanel = Simd<T>::kPanel;
  for (int64_t c = 0; c < columns; ++c) to[c] += from[c / kPanel * panel_rows * kPanel + c % kPanel];
}

}  // namespace gr
