// SPDX-License-Identifier: Apache-2.0
// Zoneout: which elements of h and c keep their value of the step before.
#pragma once

#include "kernels/cpu/lstm/steps.h"
#include "kernels/cpu/mask_bits.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

// What zoneout holds of h or of c, for the panels of one worker and the rows of one step.
template <class T>
class Zoneout {
 public:
  using S = Widened<T>;

  // `bits` has room for B * mask_groups(columns).
  Zoneout(const LstmVariant<T>& variant, Purpose purpose, double p, int64_t columns, const Share& panels,
          uint16_t* bits)
      : p_(p),
        drawn_(p > 0 && variant.seed != nullptr),
        mask_(make_mask(drawn_ ? *variant.seed : 0, purpose, p)),
        groups_of_row_(mask_groups(columns)),
        first_(panels.begin * kUnits<S> / kMaskGroup),
        bits_(bits) {
    const int64_t end = panels.end * kUnits<S> < columns ? panels.end * kUnits<S> : columns;
    groups_ = mask_groups(end) - first_;
  }

  bool any() const { return p_ > 0; }

  // Masks of the rows of time t, which at() then takes by i.
  void draw(const Schedule& schedule, int64_t B, int64_t t) const {
    if (!drawn_) return;
    for (int64_t i = 0; i < schedule.active(t); ++i) {
      const int64_t row = t * B + schedule.row(i);
      draw_mask(mask_, row * groups_of_row_ + first_, groups_, bits_ + i * groups_);
    }
  }

  // 1 where an element keeps its value of the step before, 0 where it does not; p everywhere without a seed.
  Vec<S> at(int64_t i, int64_t panel) const {
    if (!drawn_) return broadcast(static_cast<S>(p_));
    return mask_lanes<S>(bits_ + i * groups_, panel * kUnits<S> - first_ * kMaskGroup) ? broadcast(S{1}) : Vec<S>{};
  }

 private:
  double p_;
  bool drawn_;
  Mask mask_;
  int64_t groups_of_row_, first_, groups_;
  uint16_t* bits_;
};

// Both masks of zoneout.
template <class T>
struct Zoneouts {
  Carved<uint16_t, 2> bits;
  Zoneout<T> hidden, cell;

  static Zoneouts of(const LstmVariant<T>& v, int64_t B, int64_t H, int64_t P, const Share& share) {
    const int64_t of_hidden = v.zoneout_h > 0 ? B * mask_groups(P) : 0,
                  of_cell = v.zoneout_c > 0 ? B * mask_groups(H) : 0;
    auto bits = carve<uint16_t>(Slot::kLstmMasks, {of_hidden, of_cell});
    uint16_t *hidden = bits[0], *cell = bits[1];
    return {std::move(bits),
            Zoneout<T>(v, Purpose::kZoneoutHidden, v.zoneout_h, P, projected<Widened<T>>(share, H, P), hidden),
            Zoneout<T>(v, Purpose::kZoneoutCell, v.zoneout_c, H, share, cell)};
  }

  void draw(const Schedule& schedule, int64_t B, int64_t t) const {
    hidden.draw(schedule, B, t);
    cell.draw(schedule, B, t);
  }
};

// z * before + (1 - z) * after, and exactly one of the two where z is 1 or 0.
template <class V>
V mix(V z, V before, V after) {
  return z == 0 ? after : (z == 1 ? before : z * before + (1 - z) * after);
}

}  // namespace

}  // namespace llmkern::cpu::LLMKERN_ISA
