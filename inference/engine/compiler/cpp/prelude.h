// Every compiled step begins with this text, after Inductor's own prefix (at::vec::Vectorized comes from there): matrix
// products and a tanh for the vectors of the processor. Sizes and strides are template arguments, so that the compiler
// sees them as constants and unrolls the loops over them.
#include <cstring>
extern "C" void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*, const float*,
                       const int*, const float*, const int*, const float*, float*, const int*);
extern "C" void dgemm_(const char*, const char*, const int*, const int*, const int*, const double*, const double*,
                       const int*, const double*, const int*, const double*, double*, const int*);
static inline void blas(char ta, char tb, int m, int n, int k, const float* a, int lda, const float* b, int ldb,
                        float beta, float* c, int ldc) {
    const float one = 1;
    sgemm_(&ta, &tb, &m, &n, &k, &one, a, &lda, b, &ldb, &beta, c, &ldc);
}
static inline void blas(char ta, char tb, int m, int n, int k, const double* a, int lda, const double* b, int ldb,
                        double beta, double* c, int ldc) {
    const double one = 1;
    dgemm_(&ta, &tb, &m, &n, &k, &one, a, &lda, b, &ldb, &beta, c, &ldc);
}
// tanh x = x p(x²) / q(x²) up to 9.02, beyond which it is 1: p and q of least relative error, 2.1e-8, rounding aside.
template <typename V> static inline V tanh_of(const V& x) { return x.tanh(); }
static inline at::vec::Vectorized<float> tanh_of(const at::vec::Vectorized<float>& x) {
    using V = at::vec::Vectorized<float>;
    const V z = at::vec::clamp(x, V(-9.02f), V(9.02f)), t = z * z;
    V p(1.331907166e-8f), q(7.762019095e-7f);
    for (float c : {2.058348022e-5f, 3.494034450e-3f, 1.337971783e-1f, 1.0f}) p = at::vec::fmadd(p, t, V(c));
    for (float c : {3.283092694e-4f, 2.587107272e-2f, 4.671303307e-1f, 1.0f}) q = at::vec::fmadd(q, t, V(c));
    return at::vec::clamp(z * p / q, V(-1.0f), V(1.0f));
}
struct Any {
    char* at;
    template <typename T> operator T*() const { return reinterpret_cast<T*>(at); }
};
template <typename T, int M, int N, int SR, int SC, int R, int C>
static inline void copy_matrix(const T* from, T* to) {
    for (int m = 0; m < M; ++m) {
        if constexpr (SC == 1 && C == 1) std::memmove(to + m * R, from + m * SR, N * sizeof(T));
        else for (int n = 0; n < N; ++n) to[m * R + n * C] = from[m * SR + n * SC];
    }
}
// c (+)= a b for ROWS rows and COLS vectors of columns, whose sums stay in registers; of the last vector LAST columns.
template <typename T, bool ADD, bool WHOLE, int ROWS, int COLS, int LAST, int K, int AR, int AC, int BR, int CR, int CC>
static inline void tile_of_product(const T* a, const T* b, T* c) {
    using V = at::vec::Vectorized<T>;
    constexpr int W = V::size();
    V sum[ROWS][COLS], right[COLS];
    T line[W];
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < COLS; ++j) {
            const int here = j == COLS - 1 ? LAST : W;
            T* to = c + r * CR + j * W * CC;
            if constexpr (!ADD) sum[r][j] = V(0);
            else if constexpr (CC == 1) sum[r][j] = here == W ? V::loadu(to) : V::loadu(to, here);
            else {
                for (int i = 0; i < W; ++i) line[i] = i < here ? to[i * CC] : T(0);
                sum[r][j] = V::loadu(line);
            }
        }
    for (int k = 0; k < K; ++k) {
        for (int j = 0; j < COLS; ++j) {
            const T* from = b + k * BR + j * W;
            right[j] = WHOLE || j < COLS - 1 || LAST == W ? V::loadu(from) : V::loadu(from, LAST);
        }
        for (int r = 0; r < ROWS; ++r) {
            const V left(a[r * AR + k * AC]);
            for (int j = 0; j < COLS; ++j) sum[r][j] = at::vec::fmadd(left, right[j], sum[r][j]);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < COLS; ++j) {
            const int here = j == COLS - 1 ? LAST : W;
            T* to = c + r * CR + j * W * CC;
            if constexpr (CC == 1) here == W ? sum[r][j].store(to) : sum[r][j].store(to, here);
            else {
                sum[r][j].store(line);
                for (int i = 0; i < here; ++i) to[i * CC] = line[i];
            }
        }
}
template <typename T, bool ADD, bool WHOLE, int COLS, int LAST, int M, int K, int AR, int AC, int BR, int CR, int CC>
static inline void columns_of_product(const T* a, const T* b, T* c) {
    int m = 0;
    for (; m + 4 <= M; m += 4)
        tile_of_product<T, ADD, WHOLE, 4, COLS, LAST, K, AR, AC, BR, CR, CC>(a + m * AR, b, c + m * CR);
    for (; m < M; ++m)
        tile_of_product<T, ADD, WHOLE, 1, COLS, LAST, K, AR, AC, BR, CR, CC>(a + m * AR, b, c + m * CR);
}
// The same where the columns of b and the rows of a are contiguous, and rows are few: vectors run along k.
template <typename T, bool ADD, int M, int N, int K, int AR, int BC, int CR, int CC>
static inline void dots(const T* a, const T* b, T* c) {
    using V = at::vec::Vectorized<T>;
    constexpr int W = V::size();
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) {
            const T *left = a + m * AR, *right = b + n * BC;
            V sum(0), other(0);
            int k = 0;
            for (; k + 2 * W <= K; k += 2 * W) {
                sum = at::vec::fmadd(V::loadu(left + k), V::loadu(right + k), sum);
                other = at::vec::fmadd(V::loadu(left + k + W), V::loadu(right + k + W), other);
            }
            for (; k + W <= K; k += W) sum = at::vec::fmadd(V::loadu(left + k), V::loadu(right + k), sum);
            T total = at::vec::vec_reduce_all<T>([](V& x, V& y) { return x + y; }, sum + other);
            for (; k < K; ++k) total += left[k] * right[k];
            T* to = c + m * CR + n * CC;
            *to = ADD ? *to + total : total;
        }
}
// c (M, N) (+)= a (M, K) b (K, N), strides in elements.
template <typename T, bool ADD, int M, int N, int K, int AR, int AC, int BR, int BC, int CR, int CC>
static inline void small_product(const T* a, const T* b, T* c) {
    constexpr int W = at::vec::Vectorized<T>::size();
    constexpr int BLOCKS = (N + W - 1) / W, LAST = N - (BLOCKS - 1) * W;
    if constexpr (M < 4 && BR == 1 && BC != 1 && AC == 1) return dots<T, ADD, M, N, K, AR, BC, CR, CC>(a, b, c);
    constexpr bool PACK = BC != 1 || (LAST != W && M >= 4);
    constexpr int ROW = PACK ? BLOCKS * W : BR;
    T packed[PACK ? K * BLOCKS * W : 1];
    if constexpr (PACK) {
        for (int k = 0; k < K; ++k) {
            T* to = packed + k * ROW;
            for (int n = 0; n < N; ++n) to[n] = b[k * BR + n * BC];
            for (int n = N; n < ROW; ++n) to[n] = T(0);
        }
        b = packed;
    }
    constexpr int TILES = (BLOCKS - 1) / 3;
    for (int i = 0; i < TILES; ++i)
        columns_of_product<T, ADD, PACK, 3, W, M, K, AR, AC, ROW, CR, CC>(a, b + i * 3 * W, c + i * 3 * W * CC);
    columns_of_product<T, ADD, PACK, BLOCKS - 3 * TILES, LAST, M, K, AR, AC, ROW, CR, CC>(
        a, b + TILES * 3 * W, c + TILES * 3 * W * CC);
}
