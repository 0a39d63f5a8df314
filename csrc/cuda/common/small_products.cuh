// Products of small matrices: a thread's 4 x 4 sums, over four terms at once.
#pragma once

#include "cuda/common/tile.cuh"

namespace wmk {

// terms[k][i] = element i of term `from` + k; BY_ROW: each row of `matrix` holds an element's terms, else a term's
// elements.
template <bool BY_ROW, typename T>
__device__ __forceinline__ void load_terms(T (&terms)[4][4], const T* matrix, int pitch, int from) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Vec4<T> vec = load_vec4(matrix + (BY_ROW ? i * pitch + from : (from + i) * pitch));
#pragma unroll
    for (int j = 0; j < 4; ++j) terms[BY_ROW ? j : i][BY_ROW ? i : j] = vec.value[j];
  }
}

// sums[row][column] += left times right, over the four terms from `from` on that `keep(term, row, column)` keeps; times
// weights[term] if there are any.
template <bool LEFT_BY_ROW, bool RIGHT_BY_COLUMN, typename T, typename Keep>
__device__ __forceinline__ void accumulate_four(T (&sums)[4][4], const T* left, int left_pitch, const T* right,
                                                int right_pitch, int from, const T* weights, Keep keep) {
  T a[4][4], b[4][4];
  load_terms<LEFT_BY_ROW>(a, left, left_pitch, from);
  load_terms<RIGHT_BY_COLUMN>(b, right, right_pitch, from);
#pragma unroll
  for (int term = 0; term < 4; ++term) {
#pragma unroll
    for (int column = 0; column < 4; ++column) {
      if (weights != nullptr) b[term][column] *= weights[from + term];
#pragma unroll
      for (int row = 0; row < 4; ++row)
        if (keep(term, row, column)) sums[row][column] += a[term][row] * b[term][column];
    }
  }
}
// Over terms `from` to `to`, multiples of four.
template <bool LEFT_BY_ROW, bool RIGHT_BY_COLUMN, typename T>
__device__ __forceinline__ void accumulate(T (&sums)[4][4], const T* left, int left_pitch, const T* right,
                                           int right_pitch, int from, int to, const T* weights = nullptr) {
#pragma unroll 1
  for (int k = from; k < to; k += 4) {
    accumulate_four<LEFT_BY_ROW, RIGHT_BY_COLUMN>(sums, left, left_pitch, right, right_pitch, k, weights,
                                                  [](int, int, int) { return true; });
  }
}
// Over the four terms of the diagonal of a triangle, at `from`.
template <bool LEFT_BY_ROW, bool RIGHT_BY_COLUMN, typename T, typename Keep>
__device__ __forceinline__ void accumulate_diagonal(T (&sums)[4][4], const T* left, int left_pitch, const T* right,
                                                    int right_pitch, int from, Keep keep) {
  accumulate_four<LEFT_BY_ROW, RIGHT_BY_COLUMN>(sums, left, left_pitch, right, right_pitch, from,
                                                static_cast<const T*>(nullptr), keep);
}
template <typename T>
__device__ __forceinline__ void store_sums(T* to, int pitch, const T (&sums)[4][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) store_vec4(to + i * pitch, {{sums[i][0], sums[i][1], sums[i][2], sums[i][3]}});
}

}  // namespace wmk
