// A queue in the place of the HLS stream, for simulation. A synthesis tool brings its own header of this name.
#ifndef QCOMPILE_HLS_STREAM_H
#define QCOMPILE_HLS_STREAM_H

#include <deque>

namespace hls {
template <class T>
class stream {
  std::deque<T> items;

 public:
  bool empty() const { return items.empty(); }
  void write(const T &item) { items.push_back(item); }
  T read() {
    T item = items.front();
    items.pop_front();
    return item;
  }
};
}  // namespace hls

#endif
