// Rope and attention of a fused decode step: one launch from the sums of q|k|v to the input of the
// product that follows. Compiled with HEAD_DIM and GROUP, the query heads of a key head.
//
// Blocks share out key heads, rows and, in clusters, splits of a row's context. Keys and values come
// through a ring in shared memory of each warp's own, those of earlier steps before the wait for
// q|k|v. LANES threads have one position; scores and sums are float32 on plain cores, which one query
// head a key head leaves idle.

#include "sums.cuh"

constexpr int LANES = HEAD_DIM / 8;      // 8 elements of 16 bit each
constexpr int TOGETHER = 32 / LANES;     // positions of one load of a warp
constexpr int STEP = 8;                  // positions of a warp at a time
constexpr int LOADS = STEP / TOGETHER;
constexpr int WIDTH = GROUP * HEAD_DIM;  // of the queries of one key head
constexpr int WARPS = 4, THREADS = WARPS * 32;
constexpr int STAGES = 3;                // of a warp's ring, of a step's keys and values each
constexpr int STAGE_BYTES = 2 * LOADS * 512;
constexpr int MOST_SPLITS = 8;
constexpr float NOTHING = -1e30f;        // the peak of no scores; finite, for differences of two
static_assert(LANES * TOGETHER == 32 && LOADS * TOGETHER == STEP, "HEAD_DIM of 64, 128 or 256");

struct Softmax {  // of one query head, over the positions that were seen; mixed: 8 elements of a lane
  float peak = NOTHING, total = 0.f, mixed[8] = {};

  __device__ __forceinline__ void rescale(float new_peak) {
    const float fading = exp2f(peak - new_peak);
    peak = new_peak;
    total *= fading;
#pragma unroll
    for (int e = 0; e < 8; e++) mixed[e] *= fading;
  }
  __device__ __forceinline__ void add(float share, uint4 value) {
    total += share;
    mixed[0] += share * low_half(value.x); mixed[1] += share * high_half(value.x);
    mixed[2] += share * low_half(value.y); mixed[3] += share * high_half(value.y);
    mixed[4] += share * low_half(value.z); mixed[5] += share * high_half(value.z);
    mixed[6] += share * low_half(value.w); mixed[7] += share * high_half(value.w);
  }
  // with those of the lanes that have other positions
  __device__ __forceinline__ void merge() {
#pragma unroll
    for (int step = LANES; step < 32; step *= 2) {
      rescale(fmaxf(peak, __shfl_xor_sync(~0u, peak, step)));
      total += __shfl_xor_sync(~0u, total, step);
#pragma unroll
      for (int e = 0; e < 8; e++) mixed[e] += __shfl_xor_sync(~0u, mixed[e], step);
    }
  }
};

__device__ __forceinline__ float score(const float (&q)[8], uint4 key) {
  return q[0] * low_half(key.x) + q[1] * high_half(key.x) + q[2] * low_half(key.y) + q[3] * high_half(key.y) +
         q[4] * low_half(key.z) + q[5] * high_half(key.z) + q[6] * low_half(key.w) + q[7] * high_half(key.w);
}

__device__ __forceinline__ float sum_of_position(float value) {
#pragma unroll
  for (int step = 1; step < LANES; step *= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

// Blocks of a cluster write to each other's shared memory, once all of them are there.
__device__ __forceinline__ void say_started() { asm volatile("barrier.cluster.arrive.relaxed.aligned;"); }
__device__ __forceinline__ void wait_started() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
__device__ __forceinline__ void exchange_done() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void send(float* at, int rank, float value) {
  u32 own = static_cast<u32>(__cvta_generic_to_shared(at)), theirs;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(own), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(theirs), "f"(value) : "memory");
}

struct Scratch {
  float qkv[WIDTH + 2 * HEAD_DIM];  // of this row and key head, normed, before rope
  float queries[WIDTH];             // after it, times scale
  __align__(16) u16 fresh[2][HEAD_DIM];  // key and value of the new position
  float peaks[WARPS][GROUP], totals[WARPS][GROUP];
  float sent[WIDTH], sent_peaks[MOST_SPLITS][GROUP], sent_totals[MOST_SPLITS][GROUP];  // from a cluster's blocks
};

// 16 bytes into shared memory, zeros where they are not wanted.
__device__ __forceinline__ void copy_piece(u32 to, const u16* from, bool wanted) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(wanted ? 16 : 0) : "memory");
}

// Eight ranks of one column times eight of A x.
__device__ __forceinline__ float multiply_eight(uint4 b, const float* shrunk) {
  const float4 low = reinterpret_cast<const float4*>(shrunk)[0], high = reinterpret_cast<const float4*>(shrunk)[1];
  return low_half(b.x) * low.x + high_half(b.x) * low.y + low_half(b.y) * low.z + high_half(b.y) * low.w +
         (low_half(b.z) * high.x + high_half(b.z) * high.y + low_half(b.w) * high.z + high_half(b.w) * high.w);
}

struct Cache {
  u16 *keys, *values;  // [blocks, 1 << block_shift, kv_heads, HEAD_DIM]
  const int* tables;   // [rows, table_stride]
  const int *lengths, *slots, *positions;  // [rows]
  int table_stride, block_shift;  // a block holds STEP positions or more, so that none is in two
};

__device__ __forceinline__ void attend(float* sums, const Adapters& adapters, const float* squares, const Cache& cache,
                                       const u16* cos, const u16* sin, u16* out, float share, float eps, float scale,
                                       int padded) {
  constexpr int COLUMNS = WIDTH + 2 * HEAD_DIM, ITEMS = (COLUMNS + THREADS - 1) / THREADS;
  const int split = blockIdx.x, splits = gridDim.x, kv_head = blockIdx.y, kv_heads = gridDim.y, row = blockIdx.z;
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  __shared__ Scratch scratch;
  u8* ring = shared + warp * STAGES * STAGE_BYTES;
  float* shrunk = reinterpret_cast<float*>(shared + WARPS * STAGES * STAGE_BYTES);  // [3, ranks]
  let_next_start();
  if (splits > 1) say_started();

  // Positions start to stop are this block's, all from earlier steps; the owner has the new one too.
  const int length = __ldg(cache.lengths + row), slot = __ldg(cache.slots + row);
  const int position = __ldg(cache.positions + row), adapter = adapters.b ? __ldg(adapters.slots + row) : 0;
  const int shift = cache.block_shift, blocks = (length + (1 << shift) - 1) >> shift;
  const int span = (blocks + splits - 1) / splits << shift, start = split * span;
  const int stop = min(start + span, length - 1);
  const bool owner = length == 0 ? split == 0 : length - 1 >= start && length - 1 < start + span;
  const int* table = cache.tables + static_cast<u64>(row) * cache.table_stride;
  const u32 landing = static_cast<u32>(__cvta_generic_to_shared(ring)) + lane * 16;
  auto fetch = [&](int base, int stage) {
    if (base < stop) {
      const u64 place = (static_cast<u64>(__ldg(table + (base >> shift))) << shift) + (base & ((1 << shift) - 1));
#pragma unroll
      for (int i = 0; i < LOADS; i++) {
        const int offset = i * TOGETHER + lane / LANES;
        const u64 from = ((place + offset) * kv_heads + kv_head) * HEAD_DIM + lane % LANES * 8;
        const u32 to = landing + stage * STAGE_BYTES + i * 512;
        copy_piece(to, cache.keys + from, base + offset < stop);
        copy_piece(to + LOADS * 512, cache.values + from, base + offset < stop);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  int base = start + warp * STEP;
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; stage++) fetch(base + stage * WARPS * STEP, stage);

  // q|k|v of this row and key head: W x plus LoRA, times 1 / rms
  const int wanted = owner ? COLUMNS : WIDTH;
  auto find = [&](int column) {  // among all columns of q|k|v
    if (column < WIDTH) return kv_head * WIDTH + column;
    const int part = (column - WIDTH) / HEAD_DIM;
    return (kv_heads * GROUP + part * kv_heads + kv_head) * HEAD_DIM + (column - WIDTH) % HEAD_DIM;
  };
  // Nothing writes B within a step. The first 16 ranks are held where registers allow, the others
  // are on their way to the L2.
  constexpr bool HELD = ITEMS <= 3;
  uint4 words[HELD ? ITEMS : 1][2];
  auto find_b = [&](int column) {
    return adapters.b + (static_cast<u64>(adapter - 1) * adapters.outputs + find(column)) * adapters.ranks;
  };
  if (adapter)
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      const int column = tid + i * THREADS;
      if (column >= wanted) break;
      const u16* b = find_b(column);
      if (HELD) {
        words[HELD ? i : 0][0] = __ldg(reinterpret_cast<const uint4*>(b));
        words[HELD ? i : 0][1] = __ldg(reinterpret_cast<const uint4*>(b) + 1);
      }
      for (int r = HELD ? 16 : 0; r < adapters.ranks; r += 64) prefetch(b + r);
    }
  wait_for_previous();
  float* own = sums + static_cast<u64>(row) * adapters.outputs;
  float taken[ITEMS];
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {
    const int column = tid + i * THREADS;
    if (column < wanted) taken[i] = __ldcg(own + find(column));
  }
  const float factor = inverse_rms(squares, row, share, eps);
  if (adapter) {  // scale * A x of this row
    const int ranks = 3 * adapters.ranks;
    const float* from = adapters.shrunk + (static_cast<u64>(row) * adapters.count + adapter - 1) * ranks;
    for (int i = tid; i < ranks; i += THREADS) shrunk[i] = __ldg(adapters.scales + row) * __ldcg(from + i);
    __syncthreads();
    auto part_of = [&](int column) {
      return shrunk + (column < WIDTH ? 0 : 1 + (column - WIDTH) / HEAD_DIM) * adapters.ranks;
    };
    for (int r = 0; r < adapters.ranks; r += 16)
#pragma unroll
      for (int i = 0; i < ITEMS; i++) {
        const int column = tid + i * THREADS;
        if (column >= wanted) break;
        uint4 low = words[HELD ? i : 0][0], high = words[HELD ? i : 0][1];
        if (!HELD || r) {
          const uint4* b = reinterpret_cast<const uint4*>(find_b(column) + r);
          low = __ldg(b);
          high = __ldg(b + 1);
        }
        taken[i] += multiply_eight(low, part_of(column) + r) + multiply_eight(high, part_of(column) + r + 8);
      }
  }
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {
    const int column = tid + i * THREADS;
    if (column >= wanted) break;
    if (column >= WIDTH || splits == 1) own[find(column)] = 0.f;  // else other blocks may yet look at it
    scratch.qkv[column] = rounded(taken[i] * factor);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {
    const int column = tid + i * THREADS;
    if (column >= wanted) break;
    const int inner = column % HEAD_DIM;
    float value = scratch.qkv[column];
    if (column < WIDTH + HEAD_DIM) {  // products are rounded, as in the step that is not fused
      const bool lower = inner < HEAD_DIM / 2;
      const float other = scratch.qkv[lower ? column + HEAD_DIM / 2 : column - HEAD_DIM / 2];
      const float c = low_half(__ldg(cos + position * HEAD_DIM + inner));
      const float s = low_half(__ldg(sin + position * HEAD_DIM + inner));
      value = rounded(rounded(value * c) + (lower ? -rounded(other * s) : rounded(other * s)));
    }
    if (column < WIDTH) {
      scratch.queries[column] = value * scale;
    } else {
      const int which = (column - WIDTH) / HEAD_DIM;
      const u16 half = static_cast<u16>(__float_as_uint(value) >> 16);
      scratch.fresh[which][inner] = half;
      if (slot >= 0)
        (which ? cache.values : cache.keys)[(static_cast<u64>(slot) * kv_heads + kv_head) * HEAD_DIM + inner] = half;
    }
  }
  __syncthreads();

  float q[GROUP][8];
#pragma unroll
  for (int g = 0; g < GROUP; g++)
#pragma unroll
    for (int e = 0; e < 8; e++) q[g][e] = scratch.queries[g * HEAD_DIM + lane % LANES * 8 + e];
  Softmax heads[GROUP];
  for (int stage = 0; base < stop; base += WARPS * STEP, stage = stage + 1 == STAGES ? 0 : stage + 1) {
    fetch(base + (STAGES - 1) * WARPS * STEP, stage == 0 ? STAGES - 1 : stage - 1);
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");  // a lane reads what it copied itself
    const uint4* own_pieces = reinterpret_cast<const uint4*>(ring + stage * STAGE_BYTES) + lane;
    float scores[GROUP][LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      const uint4 key = own_pieces[i * 32];
#pragma unroll
      for (int g = 0; g < GROUP; g++) scores[g][i] = sum_of_position(score(q[g], key));
    }
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      float peak = heads[g].peak;
#pragma unroll
      for (int i = 0; i < LOADS; i++) {
        if (base + i * TOGETHER + lane / LANES >= stop) scores[g][i] = NOTHING;
        peak = fmaxf(peak, scores[g][i]);
      }
      heads[g].rescale(peak);
    }
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      const uint4 value = own_pieces[(LOADS + i) * 32];
      const bool seen = base + i * TOGETHER + lane / LANES < stop;
#pragma unroll
      for (int g = 0; g < GROUP; g++) heads[g].add(seen ? exp2f(scores[g][i] - heads[g].peak) : 0.f, value);
    }
  }
  if (owner && length > 0 && warp == 0) {
    const uint4 key = *reinterpret_cast<const uint4*>(scratch.fresh[0] + lane % LANES * 8);
    const uint4 value = *reinterpret_cast<const uint4*>(scratch.fresh[1] + lane % LANES * 8);
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      const float sum = sum_of_position(score(q[g], key));
      if (lane < LANES) {
        heads[g].rescale(fmaxf(heads[g].peak, sum));
        heads[g].add(exp2f(sum - heads[g].peak), value);
      }
    }
  }
  // A warp's sums take the place of what it read.
  auto mixed_of = [&](int warp) { return reinterpret_cast<float*>(shared + warp * STAGES * STAGE_BYTES); };
  static_assert(WIDTH * 4 <= STAGES * STAGE_BYTES, "no room for a warp's sums");
  __syncwarp();
#pragma unroll
  for (int g = 0; g < GROUP; g++) {
    heads[g].merge();
    if (lane < LANES) {
#pragma unroll
      for (int e = 0; e < 8; e++) mixed_of(warp)[g * HEAD_DIM + lane * 8 + e] = heads[g].mixed[e];
      if (lane == 0) {
        scratch.peaks[warp][g] = heads[g].peak;
        scratch.totals[warp][g] = heads[g].total;
      }
    }
  }
  __syncthreads();
  auto store = [&](int column, float mixed, float total) {
    const float mean = total > 0.f ? mixed / total : 0.f;
    const u32 half = round_pair(mean, 0.f);
    out[tiled_at(row, kv_head * WIDTH + column, padded)] = static_cast<u16>(half);
  };
  if (splits > 1) wait_started();
  const int part = WIDTH / splits;  // columns that a block of a cluster puts together
  for (int column = tid; column < WIDTH; column += THREADS) {
    const int g = column / HEAD_DIM;
    float peak = NOTHING, total = 0.f, mixed = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) peak = fmaxf(peak, scratch.peaks[w][g]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float fading = exp2f(scratch.peaks[w][g] - peak);
      total += scratch.totals[w][g] * fading;
      mixed += mixed_of(w)[column] * fading;
    }
    if (splits == 1) {
      store(column, mixed, total);
      continue;
    }
    send(&scratch.sent[split * part + column % part], column / part, mixed);
    if (const int rank = column % HEAD_DIM; rank < splits) {
      send(&scratch.sent_peaks[split][g], rank, peak);
      send(&scratch.sent_totals[split][g], rank, total);
    }
  }
  if (splits == 1) return;
  exchange_done();
  for (int column = tid; column < part; column += THREADS) {
    const int g = (split * part + column) / HEAD_DIM;
    float peak = NOTHING, total = 0.f, mixed = 0.f;
    for (int s = 0; s < splits; s++) peak = fmaxf(peak, scratch.sent_peaks[s][g]);
    for (int s = 0; s < splits; s++) {
      const float fading = exp2f(scratch.sent_peaks[s][g] - peak);
      total += scratch.sent_totals[s][g] * fading;
      mixed += scratch.sent[s * part + column] * fading;
    }
    store(split * part + column, mixed, total);
    own[kv_head * WIDTH + split * part + column] = 0.f;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) attend(
    float* sums, const float* shrunk, const u16* b, const int* slots, const float* scales, const float* squares,
    u16* keys, u16* values, const int* tables, const int* lengths, const int* cache_slots, const int* positions,
    const u16* cos, const u16* sin, u16* out, int count, int ranks, int outputs, int table_stride,
    int block_shift, float share, float eps, float scale, int padded) {
  attend(sums, {shrunk, b, slots, scales, count, ranks, outputs}, squares,
         {keys, values, tables, lengths, cache_slots, positions, table_stride, block_shift}, cos, sin, out, share, eps, scale, padded);
}
