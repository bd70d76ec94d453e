// Rows as NF4 products read them (tiles.py).

#include "sums.cuh"

// x [rows, columns] of 16 bit, tiled with zeros for padding; a thread has two neighbours. And `count` zeros in sums.
extern "C" __global__ void __launch_bounds__(256) tile(const u16* x, u16* tiled, float* sums, int rows, int columns,
                                                       int padded, int pairs, int count) {
  const int index = blockIdx.x * 256 + threadIdx.x, row = index / pairs, column = 2 * (index - row * pairs);
  for (int i = index; i < count; i += gridDim.x * 256) sums[i] = 0.f;
  if (row >= padded) return;
  const bool inside = row < rows && column < columns;
  const u32 pair = inside ? __ldg(reinterpret_cast<const u32*>(x + static_cast<u64>(row) * columns + column)) : 0;
  *reinterpret_cast<u32*>(tiled + tiled_at(row, column, padded)) = pair;
}
