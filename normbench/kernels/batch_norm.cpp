// Batch norm by the moments of a sample of the positions, with or without ReLU, on the CPU.
//
//     y = relu((x - mean) * scale + bias),  scale = weight / sqrt(var + eps)
//
// In the backward let g be dy where the ReLU was open, S = sum(g) and Q = sum(g * (x - mean)) over all
// positions, n the sampled ones. Off the sample dx = scale * g: it waits for no sum, so channels last one pass over
// dy and x writes it and adds up S and Q, and a second one visits the sampled positions alone:
//
//     dx = scale * (g - S / n - (x - mean) * Q / (n * (var + eps)))
//
// Sums are taken over parts that the shape alone fixes and joined in their order, in double: the number of
// threads changes no bit. Loops are plain; the compiler makes vectors of them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kTile = 1024;       // values of a map that are measured at a time: they stay in L1
constexpr int64_t kChunk = 256;       // values of a map that are computed before they are written
constexpr int64_t kBlock = 512;       // pixels added up together, channels last
constexpr int64_t kRun = 8192;        // bytes of neighbouring maps that are read together
constexpr int64_t kAhead = 256;       // values between what is read and what is fetched for later
constexpr int64_t kLarge = 4 << 20;   // bytes: larger results are written past the cache

// ---- values ----------------------------------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};

inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
inline float widen(bf16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline void narrow(float v, float& to) { to = v; }
inline void narrow(double v, double& to) { to = v; }
inline void narrow(float v, bf16& to) {  // to the nearest, ties to even; a NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

template <bool relu, class A> inline A activated(A away, A scale, A bias) {
  const A v = away * scale + bias;
  return relu && v <= 0 ? A(0) : v;  // a NaN passes
}

template <bool relu, class A> inline A gated(A dy, A away, A scale, A bias) {
  return relu && away * scale + bias <= 0 ? A(0) : dy;
}

// ---- memory ----------------------------------------------------------------------------------------------

// Writes `count` values from the cache to memory, past the cache where that is possible.
template <class T> inline void put(T* to, const T* from, int64_t count) {
  const int64_t bytes = count * int64_t(sizeof(T));
#ifdef __SSE2__
  if (reinterpret_cast<uintptr_t>(to) % 64 == 0 && bytes % 64 == 0) {
    const char* source = reinterpret_cast<const char*>(from);
    char* target = reinterpret_cast<char*>(to);
#if defined(__AVX512F__)
    for (int64_t i = 0; i < bytes; i += 64)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(target + i), _mm512_loadu_si512(source + i));
#elif defined(__AVX__)
    for (int64_t i = 0; i < bytes; i += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(target + i),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i)));
#else
    for (int64_t i = 0; i < bytes; i += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + i),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i)));
#endif
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

inline void drain() {  // what was written past the cache is seen by other threads
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// Asks for values that will be read soon; the hardware does not foresee it where positions are left out.
template <class T> inline void fetch(const T* from, int64_t count) {
  const char* at = reinterpret_cast<const char*>(from);
  for (int64_t i = 0; i < count * int64_t(sizeof(T)); i += 64) __builtin_prefetch(at + i);
}

// ---- what is measured ------------------------------------------------------------------------------------

// (N, C, D, H, W) and the steps at which N, D, H and W are sampled; sn = 0 samples nothing.
struct Shape {
  int64_t n, c, d, h, w, sn, sd, sh, sw;
  int64_t rows() const { return n * d * h; }
  int64_t pixels() const { return rows() * w; }
  int64_t map() const { return d * h * w; }
  int64_t columns() const { return (w + sw - 1) / sw; }
  bool row_sampled(int64_t row) const {
    return sn && row / (d * h) % sn == 0 && row / h % d % sd == 0 && row % h % sh == 0;
  }
  bool maps_whole() const { return sd == 1 && sh == 1 && sw == 1; }
  template <class T> bool large() const { return pixels() * c * int64_t(sizeof(T)) > kLarge; }
};

// Moments of parts that hold equally many values of every channel, joined one part after the other.
struct Moments {
  double count = 0;
  std::vector<double> mean, squares;  // per channel; squares are summed about the mean
  explicit Moments(int64_t c) : mean(c, 0.0), squares(c, 0.0) {}
  // part(channel, its mean, its squares) of n values each
  template <class Part> void join(double n, Part part) {
    const double share = n / (count + n), weight = count * share;
    const int64_t c = mean.size();
#pragma omp simd
    for (int64_t j = 0; j < c; ++j) {
      double other_mean, other_squares;
      part(j, other_mean, other_squares);
      const double away = other_mean - mean[j];
      mean[j] += away * share;
      squares[j] += other_squares + away * away * weight;
    }
    count += n;
  }
  template <class A> void write(A* to_mean, A* to_var) const {
    for (size_t j = 0; j < mean.size(); ++j) {
      to_mean[j] = A(mean[j]);
      to_var[j] = A(squares[j] / count);
    }
  }
};

// The backward's two sums per channel, and what of them a sampled position loses.
template <class A> struct Losses {
  std::vector<double> S, Q;
  std::vector<A> per_value, per_distance;
  explicit Losses(int64_t c) : S(c, 0.0), Q(c, 0.0), per_value(c), per_distance(c) {}
  void settle(int64_t begin, int64_t end, double count, const A* inverse) {
    for (int64_t j = begin; j < end; ++j) {
      per_value[j] = A(S[j] / count);
      per_distance[j] = A(Q[j] / count * inverse[j] * inverse[j]);
    }
  }
};

// ---- channels last: the C values of a pixel lie together -------------------------------------------------

// Blocks of pixels by two sums about a value near their mean, the average of their first sixteen.
template <class T, class A> void measure_last(const T* x, const Shape& s, A* mean, A* var, int threads) {
  const int64_t c = s.c, columns = s.columns(), apart = s.sw * c, ahead = (kAhead / c + 1) * apart;
  std::vector<int64_t> rows;
  for (int64_t row = 0; row < s.rows(); ++row)
    if (s.row_sampled(row)) rows.push_back(row);
  const int64_t all = rows.size(), per_block = std::max<int64_t>(1, kBlock / columns);
  const int64_t blocks = (all + per_block - 1) / per_block;
  std::vector<A> sums(blocks * 3 * c, A(0));  // of a block: the value near the mean, then the two sums
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = block * per_block, end = std::min(all, begin + per_block);
    const int64_t here = (end - begin) * columns, probes = std::min<int64_t>(16, here);
    A *near = sums.data() + block * 3 * c, *one = near + c, *two = one + c;
    for (int64_t i = 0; i < probes; ++i) {
      const T* pixel = x + rows[begin + i / columns] * s.w * c + i % columns * apart;
#pragma omp simd
      for (int64_t j = 0; j < c; ++j) near[j] += widen(pixel[j]) * (A(1) / A(probes));
    }
    for (int64_t at = begin; at < end; ++at) {
      const T* pixel = x + rows[at] * s.w * c;
      for (int64_t column = 0; column < columns; ++column, pixel += apart) {
        if (s.sw > 1) fetch(pixel + ahead, c);
#pragma omp simd
        for (int64_t j = 0; j < c; ++j) {
          const A v = widen(pixel[j]) - near[j];
          one[j] += v;
          two[j] += v * v;
        }
      }
    }
  }
  Moments whole(c);
  for (int64_t block = 0; block < blocks; ++block) {
    const double n = double((std::min(all, (block + 1) * per_block) - block * per_block) * columns);
    const A *near = sums.data() + block * 3 * c, *one = near + c, *two = one + c;
    whole.join(n, [=](int64_t j, double& its_mean, double& its_squares) {
      const double away = one[j] / n, squares = two[j] - away * away * n;
      its_mean = near[j] + away;
      its_squares = std::max(squares, 0.0);  // a NaN stays one
    });
  }
  whole.write(mean, var);
}

template <bool relu, class T, class A>
void apply_last(const T* x, T* y, const Shape& s, const A* mean, const A* scale, const A* bias, int threads) {
  const int64_t c = s.c, pixels = s.pixels();
  const bool large = s.large<T>();
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<T> line(c);
#pragma omp for schedule(static)
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      const T* from = x + pixel * c;
      T* to = large ? line.data() : y + pixel * c;
#pragma omp simd
      for (int64_t j = 0; j < c; ++j) narrow(activated<relu>(widen(from[j]) - mean[j], scale[j], bias[j]), to[j]);
      if (large) put(y + pixel * c, to, c);
    }
    drain();
  }
}

// Adds a pixel to S and Q; with `off_sample` it writes its dx too.
template <bool relu, bool off_sample, class T, class A>
inline void sum_pixel(const T* dy, const T* x, T* dx, int64_t c, const A* mean, const A* scale, const A* bias, A* S,
                      A* Q) {
#pragma omp simd
  for (int64_t j = 0; j < c; ++j) {
    const A away = widen(x[j]) - mean[j], g = gated<relu>(widen(dy[j]), away, scale[j], bias[j]);
    S[j] += g;
    Q[j] += g * away;
    if (off_sample) narrow(g * scale[j], dx[j]);
  }
}

template <bool relu, class T, class A>
void backward_last(const T* dy, const T* x, T* dx, const Shape& s, const A* mean, const A* scale, const A* bias,
                   const A* inverse, double count, Losses<A>& lost, int threads) {
  const int64_t c = s.c, rows = s.rows(), per_block = std::max<int64_t>(1, kBlock / s.w);
  const int64_t blocks = (rows + per_block - 1) / per_block, ahead = (kAhead / c + 1) * s.sw * c;
  const bool large = s.large<T>();
  std::vector<A> sums(blocks * 2 * c, A(0));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<T> line(c);
    std::vector<A> own(2 * c);
    A *S = own.data(), *Q = S + c;
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      std::fill(own.begin(), own.end(), A(0));
      for (int64_t row = block * per_block; row < std::min(rows, (block + 1) * per_block); ++row) {
        const bool some = s.row_sampled(row);
        for (int64_t column = 0; column < s.w; ++column) {
          const int64_t at = (row * s.w + column) * c;
          T* to = large ? line.data() : dx + at;
          if (some && column % s.sw == 0) {
            sum_pixel<relu, false>(dy + at, x + at, to, c, mean, scale, bias, S, Q);
          } else {
            sum_pixel<relu, true>(dy + at, x + at, to, c, mean, scale, bias, S, Q);
            if (large) put(dx + at, to, c);
          }
        }
      }
      std::copy(own.begin(), own.end(), sums.begin() + block * 2 * c);
    }
#pragma omp single
    {
      for (int64_t block = 0; block < blocks; ++block)
        for (int64_t j = 0; j < c; ++j) {
          lost.S[j] += sums[block * 2 * c + j];
          lost.Q[j] += sums[block * 2 * c + c + j];
        }
      lost.settle(0, c, count, inverse);
    }
    const A *per_value = lost.per_value.data(), *per_distance = lost.per_distance.data();
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      if (!s.row_sampled(row)) continue;
      for (int64_t column = 0; column < s.w; column += s.sw) {
        const int64_t at = (row * s.w + column) * c;
        const T *grad = dy + at, *from = x + at;
        T* to = large ? line.data() : dx + at;
        if (s.sw > 1) fetch(grad + ahead, c), fetch(from + ahead, c);
#pragma omp simd
        for (int64_t j = 0; j < c; ++j) {
          const A away = widen(from[j]) - mean[j], g = gated<relu>(widen(grad[j]), away, scale[j], bias[j]);
          narrow((g - per_value[j] - away * per_distance[j]) * scale[j], to[j]);
        }
        if (large) put(dx + at, to, c);
      }
    }
    drain();
  }
}

// ---- channels first: the values of a map lie together ----------------------------------------------------
//
// A few channels at a time, over all samples: what is read a second time then lies in the cache, so that a forward
// moves 2 units of memory instead of 3 and a backward 3 instead of 5, whatever is sampled. The second visit goes
// back from the last sample, which is the nearest.

// How many channels are visited together: as few as make runs of kRun bytes.
template <class T> inline int64_t together(const Shape& s) {
  return std::min(s.c, std::max<int64_t>(1, kRun / (s.map() * int64_t(sizeof(T)))));
}

template <int step, class T, class A> inline void take(const T* from, int64_t count, A* to) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) to[j] = widen(from[j * step]);
}

template <class T, class A> inline void take(const T* from, int64_t step, int64_t count, A* to) {
  switch (step) {  // a step known to the compiler makes vectors
    case 1: return take<1>(from, count, to);
    case 2: return take<2>(from, count, to);
    case 4: return take<4>(from, count, to);
    case 8: return take<8>(from, count, to);
  }
  for (int64_t j = 0; j < count; ++j) to[j] = widen(from[j * step]);
}

// A few values, joined to the count, mean and squares of those before, by two sums about a value near their mean:
// the average of their first sixteen, which is as near as float needs, for those are among them.
template <class A, class T>
inline void join(double& count, double& mean, double& squares, const T* x, int64_t n) {
  const int64_t probes = std::min<int64_t>(16, n);
  A near = 0, one = 0, two = 0;
  for (int64_t j = 0; j < probes; ++j) near += widen(x[j]);
  near /= A(probes);
#pragma omp simd reduction(+ : one, two)
  for (int64_t j = 0; j < n; ++j) {
    const A v = widen(x[j]) - near;
    one += v;
    two += v * v;
  }
  const double off = double(one) / n, own = near + off, own_squares = std::max(two - off * one, 0.0);
  const double share = n / (count + n), away = own - mean;
  mean += away * share;
  squares += own_squares + away * away * count * share;
  count += n;
}

// The moments of one map's sample. What lies between sampled rows is asked for too: it is read next.
template <class T, class A> inline void measure_map(const T* map, const Shape& s, double& mean, double& squares) {
  double count = mean = squares = 0;
  if (s.maps_whole()) {
    for (int64_t at = 0; at < s.map(); at += kTile)
      join<A>(count, mean, squares, map + at, std::min(kTile, s.map() - at));
    return;
  }
  A tile[kTile];
  int64_t full = 0;
  const int64_t columns = s.columns();
  for (int64_t d = 0; d < s.d; d += s.sd)
    for (int64_t h = 0; h < s.h; h += s.sh) {
      const T* row = map + (d * s.h + h) * s.w;
      fetch(row + s.w, (std::min(s.h, h + s.sh) - h - 1) * s.w);
      for (int64_t column = 0, here; column < columns; column += here) {
        here = std::min(columns - column, kTile - full);
        take(row + column * s.sw, s.sw, here, tile + full);
        full += here;
        if (full == kTile) join<A>(count, mean, squares, tile, full), full = 0;
      }
    }
  if (full) join<A>(count, mean, squares, tile, full);
}

template <class T, class A>
void measure_first(const T* x, const Shape& s, int64_t begin, int64_t end, A* mean, A* var) {
  const double values = double((s.d + s.sd - 1) / s.sd * ((s.h + s.sh - 1) / s.sh) * s.columns());
  const int64_t c = end - begin;
  std::vector<double> means(c), squares(c);
  Moments whole(c);
  for (int64_t n = 0; n < s.n; n += s.sn) {
    for (int64_t j = 0; j < c; ++j)
      measure_map<T, A>(x + (n * s.c + begin + j) * s.map(), s, means[j], squares[j]);
    whole.join(values, [&](int64_t j, double& its_mean, double& its_squares) {
      its_mean = means[j];
      its_squares = squares[j];
    });
  }
  whole.write(mean + begin, var + begin);
}

template <bool relu, class T, class A>
void apply_first(const T* x, T* y, const Shape& s, int64_t begin, int64_t end, const A* mean, const A* scale,
                 const A* bias) {
  const bool large = s.large<T>();
  T tile[kChunk];
  for (int64_t n = s.n; n-- > 0;)
    for (int64_t c = begin; c < end; ++c) {
      const A m = mean[c], k = scale[c], b = bias[c];
      const int64_t map = (n * s.c + c) * s.map();
      for (int64_t at = map, here; at < map + s.map(); at += here) {
        here = std::min(kChunk, map + s.map() - at);
        T* to = large ? tile : y + at;
#pragma omp simd
        for (int64_t j = 0; j < here; ++j) narrow(activated<relu>(widen(x[at + j]) - m, k, b), to[j]);
        if (large) put(y + at, to, here);
      }
    }
}

template <bool relu, class T, class A>
void forward_first(const T* x, T* y, const Shape& s, A* mean, A* var, A* scale, const A* bias, double eps,
                   int threads) {
  const int64_t group = together<T>(s), groups = (s.c + group - 1) / group;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t begin = i * group, end = std::min(s.c, begin + group);
      if (s.sn) measure_first(x, s, begin, end, mean, var);
      for (int64_t c = begin; c < end; ++c) scale[c] = A(scale[c] / std::sqrt(double(var[c]) + eps));
      apply_first<relu>(x, y, s, begin, end, mean, scale, bias);
    }
    drain();
  }
}

template <bool relu, class T, class A>
void backward_first(const T* dy, const T* x, T* dx, const Shape& s, const A* mean, const A* scale, const A* bias,
                    const A* inverse, double count, Losses<A>& lost, int threads) {
  const int64_t group = together<T>(s), groups = (s.c + group - 1) / group;
  const bool large = s.large<T>();
  std::vector<A> sampled(s.map(), A(0));  // 1 where a position is
  for (int64_t row = 0; row < s.d * s.h; ++row)
    if (s.sn && row / s.h % s.sd == 0 && row % s.h % s.sh == 0)
      for (int64_t j = 0; j < s.w; j += s.sw) sampled[row * s.w + j] = A(1);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    T tile[kChunk];
#pragma omp for schedule(static)
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t begin = i * group, end = std::min(s.c, begin + group);
      for (int64_t n = 0; n < s.n; ++n)
        for (int64_t c = begin; c < end; ++c) {
          const A m = mean[c], k = scale[c], b = bias[c];
          const int64_t map = (n * s.c + c) * s.map();
          for (int64_t at = map, here; at < map + s.map(); at += here) {
            here = std::min(kTile, map + s.map() - at);
            A one = 0, two = 0;
#pragma omp simd reduction(+ : one, two)
            for (int64_t j = 0; j < here; ++j) {
              const A away = widen(x[at + j]) - m, g = gated<relu>(widen(dy[at + j]), away, k, b);
              one += g;
              two += g * away;
            }
            lost.S[c] += one;
            lost.Q[c] += two;
          }
        }
      lost.settle(begin, end, count, inverse);
      for (int64_t n = s.n; n-- > 0;)
        for (int64_t c = begin; c < end; ++c) {
          const A m = mean[c], k = scale[c], b = bias[c];
          const bool some = s.sn && n % s.sn == 0;
          const A per_value = some ? lost.per_value[c] : 0, per_distance = some ? lost.per_distance[c] : 0;
          const int64_t map = (n * s.c + c) * s.map();
          for (int64_t at = map, here; at < map + s.map(); at += here) {
            here = std::min(kChunk, map + s.map() - at);
            const A* counts = sampled.data() + (at - map);
            T* to = large ? tile : dx + at;
#pragma omp simd
            for (int64_t j = 0; j < here; ++j) {
              const A away = widen(x[at + j]) - m, g = gated<relu>(widen(dy[at + j]), away, k, b);
              narrow((g - counts[j] * (per_value + away * per_distance)) * k, to[j]);
            }
            if (large) put(dx + at, to, here);
          }
        }
    }
    drain();
  }
}

// ---- both ------------------------------------------------------------------------------------------------

template <class A> std::vector<A> given_or(const A* values, int64_t c, A otherwise) {
  return values ? std::vector<A>(values, values + c) : std::vector<A>(c, otherwise);
}

template <bool relu, class T, class A>
void forward(const T* x, T* y, const A* weight, const A* shift, A* mean, A* var, const Shape& s, bool last,
             double eps, int threads) {
  std::vector<A> scale = given_or(weight, s.c, A(1)), bias = given_or(shift, s.c, A(0));
  if (!last) return forward_first<relu>(x, y, s, mean, var, scale.data(), bias.data(), eps, threads);
  if (s.sn) measure_last(x, s, mean, var, threads);
  for (int64_t j = 0; j < s.c; ++j) scale[j] = A(scale[j] / std::sqrt(double(var[j]) + eps));
  apply_last<relu>(x, y, s, mean, scale.data(), bias.data(), threads);
}

template <bool relu, class T, class A>
void backward(const T* dy, const T* x, T* dx, const A* weight, const A* shift, const A* mean, const A* var,
              A* dweight, A* dbias, const Shape& s, double count, bool last, double eps, int threads) {
  std::vector<A> scale = given_or(weight, s.c, A(1)), bias = given_or(shift, s.c, A(0)), inverse(s.c);
  for (int64_t j = 0; j < s.c; ++j) {
    inverse[j] = A(1 / std::sqrt(double(var[j]) + eps));
    scale[j] *= inverse[j];
  }
  Losses<A> lost(s.c);
  (last ? backward_last<relu, T, A> : backward_first<relu, T, A>)(dy, x, dx, s, mean, scale.data(), bias.data(),
                                                                  inverse.data(), count, lost, threads);
  for (int64_t j = 0; j < s.c; ++j) {
    dweight[j] = A(lost.Q[j] * inverse[j]);
    dbias[j] = A(lost.S[j]);
  }
}

Shape shape_of(const int64_t* sizes_and_steps) {
  Shape shape;
  std::memcpy(&shape, sizes_and_steps, sizeof shape);
  return shape;
}

}  // namespace

// `shape`: N, C, D, H, W, then the steps of N, D, H, W. With a step of N of 0 mean and var are given, else they
// are written. `count`: sampled values of a channel.
#define DOORS(name, T, A)                                                                                      \
  extern "C" void forward_##name(const T* x, T* y, const A* weight, const A* bias, A* mean, A* var,            \
                                 const int64_t* shape, bool last, bool relu, double eps, int threads) {        \
    (relu ? forward<true, T, A> : forward<false, T, A>)(x, y, weight, bias, mean, var, shape_of(shape), last,  \
                                                        eps, threads);                                         \
  }                                                                                                            \
  extern "C" void backward_##name(const T* dy, const T* x, T* dx, const A* weight, const A* bias,              \
                                  const A* mean, const A* var, A* dweight, A* dbias, const int64_t* shape,     \
                                  double count, bool last, bool relu, double eps, int threads) {               \
    (relu ? backward<true, T, A> : backward<false, T, A>)(dy, x, dx, weight, bias, mean, var, dweight, dbias,  \
                                                          shape_of(shape), count, last, eps, threads);         \
  }

DOORS(float32, float, float)
DOORS(float64, double, double)
DOORS(bfloat16, bf16, float)
