// The layer's equations once more, sequence by sequence and in double, for the tests to compare
// with.
#pragma once

#include "tests/cpp/layer.h"

namespace rnn_fused {

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

inline double bounded(double x, double bound) {
  return std::isnan(bound) ? x : std::clamp(x, -bound, bound);
}

// The rows of sequence b in the order in which direction d walks them.
inline std::vector<int64_t> walk(const Layer& l, int d, int64_t b) {
  std::vector<int64_t> rows;
  for (int64_t t = 0; t < l.lengths[b]; ++t) rows.push_back(l.row(t, b));
  if (d == 1) std::reverse(rows.begin(), rows.end());
  return rows;
}

inline double dot(const double* a, const double* b, int64_t size) {
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += a[i] * b[i];
  return sum;
}

// W_ih x of one direction, [N, G*H].
inline Array multiply_input(const Layer& l, int d, DType dtype) {
  const int64_t GH = l.G() * l.H;
  const std::vector<double> input = l.input.values(), weight = l.direction[d].weight_ih.values();
  Array products(dtype, l.N * GH);
  for (int64_t n = 0; n < l.N; ++n)
    for (int64_t g = 0; g < GH; ++g)
      products.set(n * GH + g, dot(&input[n * l.I], &weight[g * l.I], l.I));
  return products;
}

// From W_ih x of each direction, in any type.
inline Forward reference_forward(const Layer& l, const Array* products) {
  Forward result(l, DType::f64, DType::f64, true);
  const int64_t H = l.H, P = l.P, G = l.G();
  const auto gate = [&](double x) { return sigmoid(l.gate_slope() * x); };
  for (int d = 0; d < l.directions; ++d) {
    const Layer::Direction& w = l.direction[d];
    const std::vector<double> weight_hh = w.weight_hh.values(), weight_hr = w.weight_hr.values();
    Forward::Direction& out = result.direction[d];
    for (int64_t b = 0; b < l.B; ++b) {
      std::vector<double> h(P), c(H), hidden(H);
      for (int64_t p = 0; p < P; ++p) h[p] = w.h0[b * P + p];
      if (l.lstm())
        for (int64_t j = 0; j < H; ++j) c[j] = w.c0[b * H + j];
      for (int64_t step = 0; step < l.lengths[b]; ++step) {
        const int64_t t = d == 0 ? step : l.lengths[b] - 1 - step, row = l.row(t, b);
        if (l.enters_reset(d, t, b)) {
          for (int64_t p = 0; p < P; ++p) h[p] = w.reset_h[b * P + p];
          for (int64_t j = 0; l.lstm() && j < H; ++j) c[j] = w.reset_c[b * H + j];
        }
        for (int64_t j = 0; j < H; ++j) {
          double x[4], r[4], gates[4];  // from the input, recurrent, activated
          for (int64_t g = 0; g < G; ++g) {
            x[g] = products[d][(row * G + g) * H + j] + (l.bias ? w.bias_ih[g * H + j] : 0);
            r[g] =
                dot(&weight_hh[(g * H + j) * P], h.data(), P) + (l.bias ? w.bias_hh[g * H + j] : 0);
          }
          switch (l.cell) {
            case Cell::lstm:
              gates[0] = gate(x[0] + r[0]);
              gates[1] = gate(x[1] + r[1]);
              gates[2] = std::tanh(x[2] + r[2]);
              gates[3] = gate(x[3] + r[3]);
              c[j] = bounded(gates[1] * c[j] + gates[0] * gates[2], l.cell_clip());
              hidden[j] = gates[3] * std::tanh(c[j]);
              break;
            case Cell::gru:
              gates[0] = gate(x[0] + r[0]);
              gates[1] = gate(x[1] + r[1]);
              gates[2] = std::tanh(x[2] + gates[0] * r[2]);
              gates[3] = r[2];
              hidden[j] = (1 - gates[1]) * gates[2] + gates[1] * h[j];
              break;
            case Cell::rnn_tanh: hidden[j] = std::tanh(x[0] + r[0]); break;
            case Cell::rnn_relu: hidden[j] = std::max(x[0] + r[0], 0.0); break;
          }
          if (!l.rnn())
            for (int64_t g = 0; g < 4; ++g) out.gates.set((row * 4 + g) * H + j, gates[g]);
          if (l.lstm()) out.cells.set(row * H + j, c[j]);
        }
        for (int64_t p = 0; p < P; ++p) {
          h[p] = l.projected() ? dot(&weight_hr[p * H], hidden.data(), H) : hidden[p];
          h[p] = round_to(l.dtype, h[p]);
          result.output.set(row * l.output_stride() + d * P + p, h[p]);
        }
      }
      for (int64_t p = 0; p < P; ++p) out.h_n.set(b * P + p, h[p]);
      if (l.lstm())
        for (int64_t j = 0; j < H; ++j) out.c_n.set(b * H + j, c[j]);
    }
  }
  return result;
}

// From what either forward pass saved.
inline Backward reference_backward(const Layer& l, const Forward& forward,
                                   const Upstream& upstream) {
  Backward result(l, DType::f64);
  const int64_t H = l.H, P = l.P, S = l.S();
  const double slope = l.gate_slope();
  for (int d = 0; d < l.directions; ++d) {
    const Layer::Direction& w = l.direction[d];
    const std::vector<double> weight_hh = w.weight_hh.values(), weight_hr = w.weight_hr.values();
    const Forward::Direction& saved = forward.direction[d];
    Backward::Direction& out = result.direction[d];
    for (int64_t b = 0; b < l.B; ++b) {
      const std::vector<int64_t> rows = walk(l, d, b);
      const auto reset = [&](int64_t step) {
        return l.enters_reset(d, d == 0 ? step : l.lengths[b] - 1 - step, b);
      };
      const auto h_after = [&](int64_t step, int64_t p) {
        return forward.output[rows[step] * l.output_stride() + d * P + p];
      };
      const auto c_after = [&](int64_t step, int64_t j) { return saved.cells[rows[step] * H + j]; };
      const auto h_before = [&](int64_t step, int64_t p) {
        if (reset(step)) return w.reset_h[b * P + p];
        return step == 0 ? w.h0[b * P + p] : h_after(step - 1, p);
      };
      const auto c_before = [&](int64_t step, int64_t j) {
        if (reset(step)) return w.reset_c[b * H + j];
        return step == 0 ? w.c0[b * H + j] : c_after(step - 1, j);
      };
      std::vector<double> dh(P), dc(H);  // of the state after the step
      for (int64_t p = 0; p < P && upstream.h_n[d].size(); ++p) dh[p] = upstream.h_n[d][b * P + p];
      for (int64_t j = 0; j < H && upstream.c_n[d].size(); ++j) dc[j] = upstream.c_n[d][b * H + j];
      for (int64_t step = l.lengths[b] - 1; step >= 0; --step) {
        const int64_t row = rows[step];
        for (int64_t p = 0; p < P && upstream.output.size(); ++p)
          dh[p] += upstream.output[row * l.output_stride() + d * P + p];

        std::vector<double> dhidden = dh, dh_before(P);  // dhidden: before the projection
        if (l.projected()) {
          dhidden.assign(H, 0);
          for (int64_t p = 0; p < P; ++p) {
            out.projected.set(row * P + p, dh[p]);
            for (int64_t j = 0; j < H; ++j) dhidden[j] += dh[p] * weight_hr[p * H + j];
          }
        }
        for (int64_t j = 0; j < H; ++j) {
          const double dy = dhidden[j];
          double a[4] = {}, grad[4] = {};
          if (!l.rnn())
            for (int64_t g = 0; g < 4; ++g) a[g] = saved.gates[(row * 4 + g) * H + j];
          switch (l.cell) {
            case Cell::lstm: {
              const auto [i, f, g, o] = a;
              const double tanh_c = std::tanh(c_after(step, j));
              if (upstream.cells[d].size()) dc[j] += upstream.cells[d][row * H + j];
              double total = dc[j] + dy * o * (1 - tanh_c * tanh_c);
              if (std::abs(c_after(step, j)) >= l.cell_clip()) total = 0;
              grad[0] = total * g * slope * i * (1 - i);
              grad[1] = total * c_before(step, j) * slope * f * (1 - f);
              grad[2] = total * i * (1 - g * g);
              grad[3] = dy * tanh_c * slope * o * (1 - o);
              dc[j] = bounded(total * f, l.grad_clip());
              if (l.projected()) out.hidden.set(row * H + j, o * tanh_c);
              break;
            }
            case Cell::gru: {
              const auto [r, z, n, hn] = a;
              grad[2] = dy * (1 - z) * (1 - n * n);
              grad[0] = grad[2] * hn * slope * r * (1 - r);
              grad[1] = dy * (h_before(step, j) - n) * slope * z * (1 - z);
              grad[3] = grad[2] * r;
              dh_before[j] += dy * z;
              break;
            }
            case Cell::rnn_tanh: grad[0] = dy * (1 - h_after(step, j) * h_after(step, j)); break;
            case Cell::rnn_relu: grad[0] = h_after(step, j) > 0 ? dy : 0; break;
          }
          for (int64_t s = 0; s < S; ++s) {
            out.gates.set((row * S + s) * H + j, grad[s]);
            if (l.cell == Cell::gru && s == 2) continue;  // W_hn's product sees hn, not n
            const int64_t gate = l.cell == Cell::gru && s == 3 ? 2 : s;
            for (int64_t p = 0; p < P; ++p)
              dh_before[p] += grad[s] * weight_hh[(gate * H + j) * P + p];
          }
        }
        for (int64_t p = 0; p < P; ++p) dh[p] = bounded(dh_before[p], l.grad_clip());
        if (!reset(step)) continue;
        for (int64_t p = 0; p < P; ++p) out.reset_h.set(b * P + p, out.reset_h[b * P + p] + dh[p]);
        for (int64_t j = 0; l.lstm() && j < H; ++j)
          out.reset_c.set(b * H + j, out.reset_c[b * H + j] + dc[j]);
        dh.assign(P, 0);
        dc.assign(H, 0);
      }
      for (int64_t p = 0; p < P; ++p) out.h0.set(b * P + p, dh[p]);
      if (l.lstm())
        for (int64_t j = 0; j < H; ++j) out.c0.set(b * H + j, dc[j]);
    }
  }
  return result;
}

}  // namespace rnn_fused
