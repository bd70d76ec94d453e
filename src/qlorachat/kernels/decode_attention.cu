// Rope and attention of a fused decode step: one launch from the sums of q|k|v to the input of the
// product that follows. Compiled with HEAD_DIM, GROUP, the query heads of a key head, STAGES, of a warp's
// ring, IN_8_BITS, whether keys and values are codes with scales (eight_bits.py), and CLUSTERS, whether the
// card has them.
//
// Blocks share out key heads, rows and splits of a row's context (Splits). Keys and values come
// through a ring in shared memory of each warp's own, those of earlier steps before the wait for
// q|k|v. What a warp makes of them is in attend_8_bits.cuh, attend_16_bits_single.cuh or
// attend_16_bits_grouped.cuh.

#if IN_8_BITS
#include "attend_8_bits.cuh"
#elif GROUP == 1
#include "attend_16_bits_single.cuh"
#else
#include "attend_16_bits_grouped.cuh"
#endif

constexpr int MOST_SPLITS = 8;

struct Sum { float mixed, total; };  // of a column, to the same peak

// Of one column, what each block has.
struct Shares {
  float mixed[MOST_SPLITS], totals[MOST_SPLITS], peaks[MOST_SPLITS];
  __device__ __forceinline__ Sum add_up() const {
    float peak = NOTHING;
#pragma unroll
    for (int s = 0; s < MOST_SPLITS; s++) peak = fmaxf(peak, peaks[s]);
    Sum sum = {0.f, 0.f};
#pragma unroll
    for (int s = 0; s < MOST_SPLITS; s++) {
      const float fading = exp2f(peaks[s] - peak);
      sum.total += totals[s] * fading;
      sum.mixed += mixed[s] * fading;
    }
    return sum;
  }
};

// Sums of one context's blocks, from those that each block has.
#if CLUSTERS

// Blocks of a cluster write to each other's shared memory, once all of them are there; each puts `part` columns
// together. A block's mbarrier counts what came: a barrier of the cluster would wait for global memory too.
struct Splits {
  float mixed[WIDTH], peaks[MOST_SPLITS][GROUP], totals[MOST_SPLITS][GROUP];  // from all blocks
  u64 received;  // mbarrier

  static __device__ __forceinline__ int part() { return WIDTH / gridDim.x; }
  static __device__ __forceinline__ int first() { return blockIdx.x * part(); }

  __device__ __forceinline__ void begin() {
    if (threadIdx.x == 0) {
      const u32 at = static_cast<u32>(__cvta_generic_to_shared(&received));
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at) : "memory");
      const int bytes = WIDTH * 4 + gridDim.x * GROUP * 8;
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;");
  }
  __device__ __forceinline__ void wait_for_others() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
  __device__ __forceinline__ u32 find_theirs(const void* own, int rank) {
    u32 theirs;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(static_cast<u32>(__cvta_generic_to_shared(own))), "r"(rank));
    return theirs;
  }
  __device__ __forceinline__ void send(float* at, int rank, float value) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(find_theirs(at, rank)),
                 "f"(value), "r"(find_theirs(&received, rank)) : "memory");
  }
  __device__ __forceinline__ void leave(int column, float peak, float total, float sum) {
    send(&mixed[blockIdx.x * part() + column % part()], column / part(), sum);
    if (const int rank = column % HEAD_DIM, g = column / HEAD_DIM; rank < gridDim.x) {
      send(&peaks[blockIdx.x][g], rank, peak);
      send(&totals[blockIdx.x][g], rank, total);
    }
  }
  __device__ __forceinline__ bool meet() {
    wait_barrier(static_cast<u32>(__cvta_generic_to_shared(&received)), 0);
    return true;
  }
  // Of one of this block's columns.
  __device__ __forceinline__ Sum put_together(int column) const {
    const int splits = gridDim.x, g = column / HEAD_DIM;
    Shares shares;
#pragma unroll
    for (int s = 0; s < MOST_SPLITS; s++) {  // all loads before any is used
      shares.mixed[s] = s < splits ? mixed[s * part() + column - first()] : 0.f;
      shares.totals[s] = s < splits ? totals[s][g] : 0.f;
      shares.peaks[s] = s < splits ? peaks[s][g] : NOTHING;
    }
    return shares.add_up();
  }
};

#else

// Blocks leave their sums in global memory; the last one of a context puts all columns together.
struct Splits {
  static constexpr int LEFT = WIDTH + 2 * GROUP;  // by a block: mixed, peaks, totals
  float* sums;   // [rows, kv_heads, splits, LEFT]
  int* arrived;  // [rows, kv_heads], zero between launches
  int before;    // blocks of this context that were here earlier

  static __device__ __forceinline__ int part() { return WIDTH; }
  static __device__ __forceinline__ int first() { return 0; }

  __device__ __forceinline__ void begin(float* all_sums, int* all_arrived) {
    if (threadIdx.x) return;
    const int context = blockIdx.z * gridDim.y + blockIdx.y;
    sums = all_sums + static_cast<u64>(context) * gridDim.x * LEFT;
    arrived = all_arrived + context;
  }
  __device__ __forceinline__ void wait_for_others() {}
  __device__ __forceinline__ void leave(int column, float peak, float total, float sum) {
    float* own = sums + blockIdx.x * LEFT;
    own[column] = sum;
    if (column % HEAD_DIM) return;
    own[WIDTH + column / HEAD_DIM] = peak;
    own[WIDTH + GROUP + column / HEAD_DIM] = total;
  }
  __device__ __forceinline__ bool meet() {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) before = atomicAdd(arrived, 1);
    __syncthreads();
    if (before + 1 < gridDim.x) return false;
    __threadfence();
    if (threadIdx.x == 0) *arrived = 0;
    return true;
  }
  __device__ __forceinline__ Sum put_together(int column) const {
    const int splits = gridDim.x, g = column / HEAD_DIM;
    Shares shares;
#pragma unroll
    for (int s = 0; s < MOST_SPLITS; s++) {  // all loads before any is used
      const float* left = sums + s * LEFT;
      shares.mixed[s] = s < splits ? __ldcg(left + column) : 0.f;
      shares.totals[s] = s < splits ? __ldcg(left + WIDTH + GROUP + g) : 0.f;
      shares.peaks[s] = s < splits ? __ldcg(left + WIDTH + g) : NOTHING;
    }
    return shares.add_up();
  }
};

#endif

struct Scratch {
  __align__(16) float qkv[WIDTH + 2 * HEAD_DIM];  // of this row and key head, normed, before rope
  float queries[WIDTH];             // after it, times scale
  Fresh fresh;
  float peaks[WARPS][GROUP], totals[WARPS][GROUP];
  Splits all;                       // where a context has several blocks
};

struct Cache {
  Cached *keys, *values;  // blocks of [1 << block_shift, kv_heads, HEAD_DIM], in 8 bits with scales behind them
  const int* tables;   // [rows, table_stride]
  const int *lengths, *slots, *positions;  // [rows]
  int table_stride, block_shift;  // a block holds STEP positions or more, so that none is in two
};

__device__ __forceinline__ void attend(float* sums, const float* squares, const Cache& cache, const u16* cos,
                                       const u16* sin, u16* out, float share, float eps, float scale, int padded,
                                       float* split_sums, int* arrived) {
  constexpr int COLUMNS = WIDTH + 2 * HEAD_DIM, ITEMS = (COLUMNS + THREADS - 1) / THREADS;
  const int split = blockIdx.x, splits = gridDim.x, kv_head = blockIdx.y, kv_heads = gridDim.y, row = blockIdx.z;
  // The compiler is told how many threads there are: then it knows whose column is a query's.
  const int tid = threadIdx.x % THREADS, lane = tid & 31, warp = tid >> 5;
  __shared__ Scratch scratch;
  u8* ring = shared + warp * STAGES * STAGE_BYTES;
  let_next_start();
#if CLUSTERS
  if (splits > 1) scratch.all.begin();
#else
  if (splits > 1) scratch.all.begin(split_sums, arrived);
#endif

  // Positions start to stop are this block's, all from earlier steps; the owner has the new one too.
  const int length = __ldg(cache.lengths + row), slot = __ldca(cache.slots + row);  // __ldg would be moved behind the wait
  const int position = __ldg(cache.positions + row);
  const int shift = cache.block_shift, blocks = (length + (1 << shift) - 1) >> shift;
  const int span = (blocks + splits - 1) / splits << shift, start = split * span;
  const int stop = min(start + span, length - 1);
  const bool owner = length == 0 ? split == 0 : length - 1 >= start && length - 1 < start + span;
  const int* table = cache.tables + static_cast<u64>(row) * cache.table_stride;
  const u32 stages = static_cast<u32>(__cvta_generic_to_shared(ring));
  auto find_place = [&](int block, int position) {
    return Place{static_cast<u64>(block) * (kv_heads * ROW << shift), position & ((1 << shift) - 1), kv_head, kv_heads, shift};
  };
  auto fetch = [&](int base, int stage) {
    if (base < stop) {
      const Place place = find_place(__ldg(table + (base >> shift)), base);
      fetch_step(cache.keys, cache.values, place, stop - base, stages + stage * STAGE_BYTES, lane);
    }
    commit_copies();
  };
  int base = start + warp * STEP;
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; stage++) fetch(base + stage * WARPS * STEP, stage);

  // q|k|v of this row and key head: sums times 1 / rms
  const int wanted = owner ? COLUMNS : WIDTH;
  auto find = [&](int column) {  // among all columns of q|k|v
    if (column < WIDTH) return kv_head * WIDTH + column;
    const int part = (column - WIDTH) / HEAD_DIM;
    return (kv_heads * GROUP + part * kv_heads + kv_head) * HEAD_DIM + (column - WIDTH) % HEAD_DIM;
  };
  u16 cosines[ITEMS], sines[ITEMS];
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {
    const int column = tid + i * THREADS;
    if (column >= min(wanted, WIDTH + HEAD_DIM)) break;
    cosines[i] = __ldca(cos + position * HEAD_DIM + column % HEAD_DIM);  // as above
    sines[i] = __ldca(sin + position * HEAD_DIM + column % HEAD_DIM);
  }
  wait_for_previous();
  float* own = sums + static_cast<u64>(row) * kv_heads * (WIDTH + 2 * HEAD_DIM);
  const float squares_of_row = __ldca(squares + row);
  float taken[ITEMS];
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {
    const int column = tid + i * THREADS;
    if (column < wanted) taken[i] = __ldcg(own + find(column));
  }
  const float factor = inverse_rms(squares_of_row, share, eps);
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {
    const int column = tid + i * THREADS;
    if (column >= wanted) break;
    if (column >= WIDTH || splits == 1) own[find(column)] = 0.f;  // else other blocks may yet look at it
    scratch.qkv[column] = rounded(taken[i] * factor);
  }
  __syncthreads();
  const Place kept = find_place(slot >> shift, slot);  // of the new position
  auto keeper = [&](int which) { return slot < 0 ? nullptr : which ? cache.values : cache.keys; };
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {
    const int column = tid + i * THREADS;
    if (column >= wanted) break;
    const int inner = column % HEAD_DIM;
    float value = scratch.qkv[column];
    if (column < WIDTH + HEAD_DIM) {  // products are rounded, as in the step that is not fused
      const bool lower = inner < HEAD_DIM / 2;
      const float other = scratch.qkv[lower ? column + HEAD_DIM / 2 : column - HEAD_DIM / 2];
      const float c = low_half(cosines[i]), s = low_half(sines[i]);
      value = rounded(rounded(value * c) + (lower ? -rounded(other * s) : rounded(other * s)));
    }
    if (column < WIDTH) {
      scratch.queries[column] = value * scale;
      continue;
    }
    const int which = (column - WIDTH) / HEAD_DIM;
    scratch.fresh.put(which, inner, value, keeper(which), kept);
  }
  __syncthreads();
#if IN_8_BITS
  if (owner && warp < 2) scratch.fresh.encode(warp, keeper(warp), kept, lane);
  __syncthreads();
#endif

  Seen seen(scratch.queries, lane);
  for (int stage = 0; base < stop; base += WARPS * STEP, stage = stage + 1 == STAGES ? 0 : stage + 1) {
    fetch(base + (STAGES - 1) * WARPS * STEP, stage == 0 ? STAGES - 1 : stage - 1);
    wait_for_copies<STAGES - 1>();
    seen.add(ring + stage * STAGE_BYTES, stop - base);
  }
  if (owner && length > 0 && warp == 0) seen.add_fresh(scratch.fresh, ring);
  // A warp's sums take the place of what it read.
  auto mixed_of = [&](int warp) { return reinterpret_cast<float*>(shared + warp * STAGES * STAGE_BYTES); };
  static_assert(WIDTH * 4 <= STAGES * STAGE_BYTES, "no room for a warp's sums");
  __syncwarp();
  seen.leave(mixed_of(warp), scratch.peaks[warp], scratch.totals[warp]);
  __syncthreads();
  const int first = kv_head * WIDTH + Splits::first();  // column of those that this block leaves
  auto store = [&](int column, float mixed, float total) {
    const float mean = rounded(total > 0.f ? mixed / total : 0.f);
    out[tiled_at(row, first + column, padded)] = static_cast<u16>(__float_as_uint(mean) >> 16);
  };
  if (splits > 1) scratch.all.wait_for_others();
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
    if (splits == 1) store(column, mixed, total);
    else scratch.all.leave(column, peak, total, mixed);
  }
  if (splits > 1) {
    if (!scratch.all.meet()) return;
    for (int column = tid; column < Splits::part(); column += THREADS) {
      const Sum sum = scratch.all.put_together(Splits::first() + column);
      store(column, sum.mixed, sum.total);
      own[first + column] = 0.f;
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, LEAST_BLOCKS) attend(
    float* sums, const float* squares, Cached* keys, Cached* values, const int* tables, const int* lengths,
    const int* cache_slots, const int* positions, const u16* cos, const u16* sin, u16* out, int table_stride,
    int block_shift, float share, float eps, float scale, int padded, float* split_sums, int* arrived) {
  attend(sums, squares, {keys, values, tables, lengths, cache_slots, positions, table_stride, block_shift}, cos, sin, out,
         share, eps, scale, padded, split_sums, arrived);
}
