// Integers of a given width, for simulating HLS C++ with an ordinary compiler. Only what generated programs use: values of at most
// 64 bits that wrap when stored; arithmetic is done in 64 bits. A synthesis tool brings its own header of this name.
#ifndef QCOMPILE_AP_INT_H
#define QCOMPILE_AP_INT_H

template <int WIDTH, bool SIGNED>
class ap_base {
  static_assert(WIDTH >= 1 && WIDTH <= 64, "1 to 64 bits");
  long long value;

 public:
  ap_base(long long v = 0) {
    unsigned long long bits = static_cast<unsigned long long>(v) << (64 - WIDTH);
    value = SIGNED ? static_cast<long long>(bits) >> (64 - WIDTH) : static_cast<long long>(bits >> (64 - WIDTH));
  }
  template <int W, bool S>
  ap_base(const ap_base<W, S> &other) : ap_base(static_cast<long long>(other)) {}
  operator long long() const { return value; }
};

template <int WIDTH>
using ap_int = ap_base<WIDTH, true>;
template <int WIDTH>
using ap_uint = ap_base<WIDTH, false>;

#endif
