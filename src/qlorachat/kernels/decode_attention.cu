// Rope and attention of a fused decode step: one launch from the sums of q|k|v to the input of the
// product that follows. Compiled with HEAD_DIM, GROUP, the query heads of a key head, STAGES, of a warp's
// ring, IN_8_BITS, whether keys and values are codes with scales (eight_bits.py), and CLUSTERS, whether the
// card has them.
//
// Blocks share out key heads, rows and splits of a row's context (Splits). Keys and values come
// through a ring in shared memory of each warp's own, those of earlier steps before the wait for
// q|k|v. LANES threads have one position; scores and sums are float32 on plain cores, which one query
// head a key head leaves idle.

#include "sums.cuh"

#if IN_8_BITS
typedef u8 Cached;
constexpr int TAIL = 8;  // bytes behind a row's codes: its scale, and nothing
#else
typedef u16 Cached;
constexpr int TAIL = 0;
#endif
constexpr int LANES = HEAD_DIM / 8;      // 8 elements each
constexpr int PIECE = 8 * sizeof(Cached);  // bytes of these
constexpr int TOGETHER = 32 / LANES;     // positions of one load of a warp
constexpr int STEP = 8;                  // positions of a warp at a time
constexpr int LOADS = STEP / TOGETHER;
constexpr int WIDTH = GROUP * HEAD_DIM;  // of the queries of one key head
constexpr int WARPS = 4, THREADS = WARPS * 32;
constexpr int ROW = HEAD_DIM + TAIL;     // elements of a position's key or value
constexpr int LOAD_BYTES = 32 * PIECE, TAIL_BYTES = TOGETHER * TAIL;
constexpr int STAGE_BYTES = 2 * LOADS * (LOAD_BYTES + TAIL_BYTES);  // a step's keys and values
constexpr int MOST_SPLITS = 8;
constexpr float NOTHING = -1e30f;        // the peak of no scores; finite, for differences of two
static_assert(LANES * TOGETHER == 32 && LOADS * TOGETHER == STEP, "HEAD_DIM of 64, 128 or 256");

struct Eight { float of[8]; };  // elements of a lane

struct Softmax {  // of one query head, over the positions that were seen
  float peak = NOTHING, total = 0.f, mixed[8] = {};

  __device__ __forceinline__ void rescale(float new_peak) {
    const float fading = exp2f(peak - new_peak);
    peak = new_peak;
    total *= fading;
#pragma unroll
    for (int e = 0; e < 8; e++) mixed[e] *= fading;
  }
  // value: times `scale` what it is
  __device__ __forceinline__ void add(float share, const Eight& value, float scale) {
    total += share;
    share *= scale;
#pragma unroll
    for (int e = 0; e < 8; e++) mixed[e] += share * value.of[e];
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

__device__ __forceinline__ float score(const float (&q)[8], const Eight& key) {
  float sum = q[0] * key.of[0];
#pragma unroll
  for (int e = 1; e < 8; e++) sum += q[e] * key.of[e];
  return sum;
}

__device__ __forceinline__ float sum_of_position(float value) {
#pragma unroll
  for (int step = 1; step < LANES; step *= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

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
  __align__(16) Cached fresh[2][ROW];  // key and value of the new position, as the cache has them
#if IN_8_BITS
  float turned[2][HEAD_DIM];        // these before they are codes
#endif
  float peaks[WARPS][GROUP], totals[WARPS][GROUP];
  Splits all;                       // where a context has several blocks
};

// A piece as numbers, in 8 bits without their scale.
__device__ __forceinline__ Eight read_piece(const u8* at) {
  Eight eight;
#if IN_8_BITS
  const uint2 codes = *reinterpret_cast<const uint2*>(at);
#pragma unroll
  for (int e = 0; e < 8; e++) {  // code + 128 as the last byte of a float of 2^23
    const u32 word = (e < 4 ? codes.x : codes.y) ^ 0x80808080u;
    eight.of[e] = __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7650u | e & 3)) - 8388736.f;
  }
#else
  const uint4 pairs = *reinterpret_cast<const uint4*>(at);
  const u32 words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
  for (int e = 0; e < 8; e++) eight.of[e] = e & 1 ? high_half(words[e / 2]) : low_half(words[e / 2]);
#endif
  return eight;
}

struct Cache {
  Cached *keys, *values;  // [blocks, 1 << block_shift, kv_heads, ROW]
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
  const int length = __ldg(cache.lengths + row), slot = __ldg(cache.slots + row);
  const int position = __ldg(cache.positions + row);
  const int shift = cache.block_shift, blocks = (length + (1 << shift) - 1) >> shift;
  const int span = (blocks + splits - 1) / splits << shift, start = split * span;
  const int stop = min(start + span, length - 1);
  const bool owner = length == 0 ? split == 0 : length - 1 >= start && length - 1 < start + span;
  const int* table = cache.tables + static_cast<u64>(row) * cache.table_stride;
  const u32 landing = static_cast<u32>(__cvta_generic_to_shared(ring)) + lane * PIECE;
#if IN_8_BITS
  const int own_tail = 2 * LOADS * LOAD_BYTES + lane / LANES * TAIL;  // in a stage
  const u32 tails = static_cast<u32>(__cvta_generic_to_shared(ring)) + own_tail;
  // The scale that the first lane of a position has copied.
  auto scale_at = [&](int stage, int which) {
    const u8* at = ring + stage * STAGE_BYTES + own_tail + which * TAIL_BYTES;
    const float own = lane % LANES ? 0.f : *reinterpret_cast<const float*>(at);
    return __shfl_sync(~0u, own, lane - lane % LANES);
  };
#else
  auto scale_at = [](int, int) { return 1.f; };
#endif
  auto fetch = [&](int base, int stage) {
    if (base < stop) {
      const u64 place = (static_cast<u64>(__ldg(table + (base >> shift))) << shift) + (base & ((1 << shift) - 1));
#pragma unroll
      for (int i = 0; i < LOADS; i++) {
        const int offset = i * TOGETHER + lane / LANES;
        const u64 from = ((place + offset) * kv_heads + kv_head) * ROW;
        const u32 to = landing + stage * STAGE_BYTES + i * LOAD_BYTES;
        copy<PIECE>(to, cache.keys + from + lane % LANES * 8, base + offset < stop);
        copy<PIECE>(to + LOADS * LOAD_BYTES, cache.values + from + lane % LANES * 8, base + offset < stop);
#if IN_8_BITS
        if (lane % LANES == 0) {
          const u32 tail = tails + stage * STAGE_BYTES + i * TAIL_BYTES;
          copy<TAIL>(tail, cache.keys + from + HEAD_DIM, base + offset < stop);
          copy<TAIL>(tail + LOADS * TAIL_BYTES, cache.values + from + HEAD_DIM, base + offset < stop);
        }
#endif
      }
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
    cosines[i] = __ldca(cos + position * HEAD_DIM + column % HEAD_DIM);  // __ldg would be moved behind the wait
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
#if IN_8_BITS
    scratch.turned[which][inner] = value;
#else
    const u16 half = static_cast<u16>(__float_as_uint(value) >> 16);
    scratch.fresh[which][inner] = half;
    if (slot >= 0)
      (which ? cache.values : cache.keys)[(static_cast<u64>(slot) * kv_heads + kv_head) * ROW + inner] = half;
#endif
  }
  __syncthreads();
#if IN_8_BITS
  if (owner && warp < 2) {  // the key's codes and scale, and the value's
    constexpr int OWN = HEAD_DIM / 32;  // elements of a lane
    float own[OWN], largest = 0.f;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      own[i] = scratch.turned[warp][lane + 32 * i];
      largest = fmaxf(largest, fabsf(own[i]));
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    const float scale = largest * (1 / 127.f), inverse = scale > 1e-38f ? 1.f / scale : 1.f;
    u8* to = (warp ? cache.values : cache.keys) + (static_cast<u64>(max(slot, 0)) * kv_heads + kv_head) * ROW;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      const u8 code = static_cast<u8>(static_cast<int>(floorf(own[i] * inverse + 0.5f)));
      scratch.fresh[warp][lane + 32 * i] = code;
      if (slot >= 0) to[lane + 32 * i] = code;
    }
    if (lane == 0) {
      *reinterpret_cast<float*>(scratch.fresh[warp] + HEAD_DIM) = scale;
      if (slot >= 0) *reinterpret_cast<float*>(to + HEAD_DIM) = scale;
    }
  }
  __syncthreads();
#endif

  float q[GROUP][8];
#pragma unroll
  for (int g = 0; g < GROUP; g++)
#pragma unroll
    for (int e = 0; e < 8; e++) q[g][e] = scratch.queries[g * HEAD_DIM + lane % LANES * 8 + e];
  Softmax heads[GROUP];
  for (int stage = 0; base < stop; base += WARPS * STEP, stage = stage + 1 == STAGES ? 0 : stage + 1) {
    fetch(base + (STAGES - 1) * WARPS * STEP, stage == 0 ? STAGES - 1 : stage - 1);
    wait_for_copies<STAGES - 1>();  // a lane reads what it copied itself
    const u8* own_pieces = ring + stage * STAGE_BYTES + lane * PIECE;
    float scores[GROUP][LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      const Eight key = read_piece(own_pieces + i * LOAD_BYTES);
      const float key_scale = scale_at(stage, i);
#pragma unroll
      for (int g = 0; g < GROUP; g++) scores[g][i] = sum_of_position(score(q[g], key)) * key_scale;
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
      const Eight value = read_piece(own_pieces + (LOADS + i) * LOAD_BYTES);
      const float value_scale = scale_at(stage, LOADS + i);
      const bool seen = base + i * TOGETHER + lane / LANES < stop;
#pragma unroll
      for (int g = 0; g < GROUP; g++) heads[g].add(seen ? exp2f(scores[g][i] - heads[g].peak) : 0.f, value, value_scale);
    }
  }
  if (owner && length > 0 && warp == 0) {
    auto find_fresh = [&](int which) { return reinterpret_cast<const u8*>(scratch.fresh[which]); };
    const Eight key = read_piece(find_fresh(0) + lane % LANES * PIECE), value = read_piece(find_fresh(1) + lane % LANES * PIECE);
#if IN_8_BITS
    auto fresh_scale = [&](int which) { return *reinterpret_cast<const float*>(find_fresh(which) + HEAD_DIM); };
#else
    auto fresh_scale = [](int) { return 1.f; };
#endif
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      const float sum = sum_of_position(score(q[g], key)) * fresh_scale(0);
      if (lane < LANES) {
        heads[g].rescale(fmaxf(heads[g].peak, sum));
        heads[g].add(exp2f(sum - heads[g].peak), value, fresh_scale(1));
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

extern "C" __global__ void __launch_bounds__(THREADS) attend(
    float* sums, const float* squares, Cached* keys, Cached* values, const int* tables, const int* lengths,
    const int* cache_slots, const int* positions, const u16* cos, const u16* sin, u16* out, int table_stride,
    int block_shift, float share, float eps, float scale, int padded, float* split_sums, int* arrived) {
  attend(sums, squares, {keys, values, tables, lengths, cache_slots, positions, table_stride, block_shift}, cos, sin, out,
         share, eps, scale, padded, split_sums, arrived);
}
