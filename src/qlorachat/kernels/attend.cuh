// What attention's two kinds of caches share (attend_16_bits.cuh, attend_8_bits.cuh): compiled with HEAD_DIM and GROUP,
// the query heads of a key head.
#pragma once

#include "sums.cuh"

constexpr int WIDTH = GROUP * HEAD_DIM;  // of the queries of one key head
constexpr int WARPS = 4, THREADS = WARPS * 32;
constexpr float NOTHING = -1e30f;        // the peak of no scores; finite, for differences of two
