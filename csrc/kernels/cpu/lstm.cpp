// SPDX-License-Identifier: Apache-2.0
// One LSTM layer on the CPU; the contract is kernels/lstm.h.
//
// The input's share of the gates is one matrix product over all steps. A step then has one parallel region: a worker
// owns whole hidden units (a panel of columns in each of the four gates), so that it multiplies by its columns of the
// recurrent weights, packed once a call, and goes straight on to the gate functions of the same units. Backward is the
// mirror image: the product that yields dh of a panel is followed by the gate gradients of the step before it.
#include "kernels/lstm.h"

#include "kernels/cpu/gemm.h"
#include "kernels/run.h"

namespace llmkern::cpu::LLMKERN_ISA {

namespace {

constexpr int64_t kFlopsPerTask = 1 << 21;  // about 20 us: less is not worth waking a thread for

template <class T>
struct Layout {
  int64_t B, H, panels;

  Layout(int64_t batch, int64_t hidden) : B(batch), H(hidden), panels((hidden + kPanel<T> - 1) / kPanel<T>) {}
  int64_t begin(int64_t panel) const { return panel * kPanel<T>; }
  int64_t end(int64_t panel) const { return (panel + 1) * kPanel<T> < H ? (panel + 1) * kPanel<T> : H; }
  int64_t grain() const { return kFlopsPerTask / (B * H * 8 * kPanel<T> + 1) + 1; }
};

// ---- forward

// Activates the gates of columns [begin, end) of one step in place, and writes the cell and the output.
template <class T>
void cell_forward(const Layout<T>& at, int64_t begin, int64_t end, const T* bias_ih, const T* bias_hh, const T* c_prev,
                  T* gates, T* c, T* h) {
  const int64_t H = at.H;
  for (int64_t b = 0; b < at.B; ++b, gates += 4 * H, c_prev += H, c += H, h += H) {
    for_lanes<T>(begin, end, [&](int64_t j, int64_t n) {
      Vec<T> gate[4];
      for (int g = 0; g < 4; ++g) {
        gate[g] = load(gates + g * H + j, n);
        if (bias_ih != nullptr) gate[g] += load(bias_ih + g * H + j, n) + load(bias_hh + g * H + j, n);
        gate[g] = g == 2 ? tanh(gate[g]) : sigmoid(gate[g]);
        store(gates + g * H + j, gate[g], n);
      }
      const Vec<T> cell = fma(gate[1], load(c_prev + j, n), gate[0] * gate[2]);
      store(c + j, cell, n);
      store(h + j, gate[3] * tanh(cell), n);
    });
  }
}

template <class T>
void execute(const LstmForward<T>& a, const Parallel& parallel) {
  const Layout<T> at(a.B, a.H);
  const int64_t H = a.H, B = a.B, panel_size = H * kPanel<T>;
  gemm(a.steps * B, 4 * H, a.I, row_major(a.input, a.I), transposed(a.weight_ih, a.I), a.gates, 4 * H, false, parallel);

  T* packed = scratch<T>(Slot::kKernel, 4 * at.panels * panel_size);  // [4, panels, H, kPanel]
  parallel(4 * at.panels, (1 << 15) / panel_size + 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t gate = p / at.panels, first = at.begin(p % at.panels), last = at.end(p % at.panels);
      pack_panels(transposed(a.weight_hh + (gate * H + first) * H, H), H, last - first, packed + p * panel_size);
    }
  });

  const T *h_prev = a.h_0, *c_prev = a.c_0;
  for (int64_t s = 0; s < a.steps; ++s) {
    const int64_t t = a.reverse ? a.steps - 1 - s : s;
    T *gates = a.gates + t * B * 4 * H, *c = a.cells + t * B * H, *h = a.output + t * B * H;
    parallel(at.panels, at.grain(), [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        for (int64_t g = 0; g < 4; ++g) {
          multiply_deep_panel(B, H, h_prev, packed + (g * at.panels + p) * panel_size, gates + g * H + at.begin(p),
                              4 * H, at.end(p) - at.begin(p), true);
        }
        cell_forward(at, at.begin(p), at.end(p), a.bias_ih, a.bias_hh, c_prev, gates, c, h);
      }
    });
    h_prev = h;
    c_prev = c;
  }
}

// ---- backward

// From dh and dc of one step (columns [begin, end)): its gate gradients, and dc of the step before, in place.
template <class T>
void cell_backward(const Layout<T>& at, int64_t begin, int64_t end, const T* gates, const T* c, const T* c_prev,
                   const T* grad_output, const T* dh, T* dc, T* grad_gates) {
  const int64_t H = at.H;
  for (int64_t b = 0; b < at.B; ++b) {
    for_lanes<T>(begin, end, [&](int64_t j, int64_t n) {
      Vec<T> gate[4];
      for (int g = 0; g < 4; ++g) gate[g] = load(gates + (4 * b + g) * H + j, n);
      const int64_t k = b * H + j;
      Vec<T> dh_t = load(dh + k, n);
      if (grad_output != nullptr) dh_t += load(grad_output + k, n);
      const Vec<T> tanh_c = tanh(load(c + k, n));
      const Vec<T> dc_t = fma(dh_t * gate[3], 1 - tanh_c * tanh_c, load(dc + k, n));
      const Vec<T> da[4] = {dc_t * gate[2] * gate[0] * (1 - gate[0]),
                            dc_t * load(c_prev + k, n) * gate[1] * (1 - gate[1]),
                            dc_t * gate[0] * (1 - gate[2] * gate[2]), dh_t * tanh_c * gate[3] * (1 - gate[3])};
      for (int g = 0; g < 4; ++g) store(grad_gates + (4 * b + g) * H + j, da[g], n);
      store(dc + k, dc_t * gate[1], n);
    });
  }
}

template <class T>
void copy_or_zero(T* to, const T* from, int64_t count) {
  if (count == 0) return;  // an empty tensor may have no memory at all
  if (from != nullptr) {
    memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
  } else {
    memset(to, 0, static_cast<size_t>(count) * sizeof(T));
  }
}

// grad_gates of every step, and the gradients of the initial states, which serve as the running dh and dc.
template <class T>
void backward_through_time(const LstmBackward<T>& a, const Parallel& parallel) {
  const Layout<T> at(a.B, a.H);
  const int64_t H = a.H, B = a.B, panel_size = 4 * H * kPanel<T>;
  copy_or_zero(a.grad_h_0, a.grad_h_n, B * H);
  copy_or_zero(a.grad_c_0, a.grad_c_n, B * H);

  T* packed = scratch<T>(Slot::kKernel, at.panels * panel_size);  // [panels, 4H, kPanel]
  parallel(at.panels, (1 << 15) / panel_size + 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      pack_panels(row_major(a.weight_hh + at.begin(p), H), 4 * H, at.end(p) - at.begin(p), packed + p * panel_size);
    }
  });

  const auto time_of = [&](int64_t s) { return a.reverse ? a.steps - 1 - s : s; };
  for (int64_t s = a.steps; s >= 0; --s) {  // s = steps: nothing above the last step; s = 0: only dh of h_0
    parallel(at.panels, at.grain(), [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        if (s < a.steps) {
          multiply_deep_panel(B, 4 * H, a.grad_gates + time_of(s) * B * 4 * H, packed + p * panel_size,
                              a.grad_h_0 + at.begin(p), H, at.end(p) - at.begin(p), false);
        }
        if (s == 0) continue;
        const int64_t t = time_of(s - 1);
        const T* c_prev = s == 1 ? a.c_0 : a.cells + time_of(s - 2) * B * H;
        cell_backward(at, at.begin(p), at.end(p), a.gates + t * B * 4 * H, a.cells + t * B * H, c_prev,
                      a.grad_output == nullptr ? nullptr : a.grad_output + t * B * H, a.grad_h_0, a.grad_c_0,
                      a.grad_gates + t * B * 4 * H);
      }
    });
  }
}

template <class T>
void execute(const LstmBackward<T>& a, const Parallel& parallel) {
  backward_through_time(a, parallel);
  const int64_t H = a.H, B = a.B, rows = a.steps * B;
  gemm(rows, a.I, 4 * H, row_major(a.grad_gates, 4 * H), row_major(a.weight_ih, a.I), a.grad_input, a.I, false,
       parallel);
  gemm(4 * H, a.I, rows, transposed(a.grad_gates, 4 * H), row_major(a.input, a.I), a.grad_weight_ih, a.I, false,
       parallel);
  // h_{t-1} is h_0 for the first step that ran and the output of the neighbouring step for the others.
  const T* first = a.grad_gates + (a.reverse ? rows - B : 0) * 4 * H;
  const T* others = a.grad_gates + (a.reverse ? 0 : B) * 4 * H;
  const T* h_prev = a.output + (a.reverse ? B : 0) * H;
  gemm(4 * H, H, B, transposed(first, 4 * H), row_major(a.h_0, H), a.grad_weight_hh, H, false, parallel);
  if (a.steps > 1) {
    gemm(4 * H, H, rows - B, transposed(others, 4 * H), row_major(h_prev, H), a.grad_weight_hh, H, true, parallel);
  }
  sum_rows(rows, 4 * H, a.grad_gates, a.grad_bias, false, parallel);
}

}  // namespace

template <class Args>
void run(const Args& args, const Parallel& parallel) {
  execute(args, parallel);
}

template void run(const LstmForward<float>&, const Parallel&);
template void run(const LstmForward<double>&, const Parallel&);
template void run(const LstmBackward<float>&, const Parallel&);
template void run(const LstmBackward<double>&, const Parallel&);

}  // namespace llmkern::cpu::LLMKERN_ISA
