// SPDX-License-Identifier: Apache-2.0
// Sampling on the CPU; the contract is kernels/sampling.h.
//
// Nothing is sorted. One pass finds the maximum, one adds up the masses where somebody needs their sum. A filter either
// lists the tokens that pass (sampling/selection.h) or finds where the nucleus ends (sampling/nucleus.h); the draw then
// skips whole blocks by their masses. Rows go to the threads; where there are fewer rows than threads, a team works on
// each long row.
#include "kernels/sampling.h"

#include "kernels/cpu/sampling/row_sampler.h"
#include "kernels/run.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

constexpr int64_t kGrainTokens = 1 << 14;  // tokens worth waking another core for
constexpr int64_t kTeamTokens = 1 << 15;   // of one row, worth a team

template <class T>
void sample_by_teams(const Sample<T>& a, const Parallel& parallel) {
  const Workspace workspace(a.V);
  for (int64_t b = 0; b < a.B; ++b) {
    RowSampler<T> row(a, b, workspace);
    run_team(parallel, (a.V + kBlock - 1) / kBlock, [&row](const Share& share) { row.run(share); });
  }
}

template <class T>
void sample_rows(const Sample<T>& a, const Parallel& parallel) {
  parallel(a.B, kGrainTokens / a.V + 1, [&](int64_t begin, int64_t end) {
    const Workspace workspace(a.V);
    Barrier nobody_else;
    const Share whole = {0, (a.V + kBlock - 1) / kBlock, nobody_else};
    for (int64_t b = begin; b < end; ++b) RowSampler<T>(a, b, workspace).run(whole);
  });
}

template <class T>
void execute(const Sample<T>& a, const Parallel& parallel) {
  const bool by_teams = a.B < parallel.threads() && a.V >= kTeamTokens;
  return by_teams ? sample_by_teams(a, parallel) : sample_rows(a, parallel);
}

}  // namespace

template <class Args>
void run(const Args& args, const Parallel& parallel) {
  execute(args, parallel);
}

template void run(const Sample<float>&, const Parallel&);
template void run(const Sample<bfloat16>&, const Parallel&);
template void run(const Sample<float16>&, const Parallel&);

}  // namespace llmkern::cpu::LLMKERN_ISA
