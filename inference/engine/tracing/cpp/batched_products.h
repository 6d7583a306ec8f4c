// A tile of M × N products for one vector of places: its sums stay in registers.
template <typename T, int M, int N>
static inline void products_beside_tile(
    const T* a, const T* b, T* out, long inner, long columns, long places, int count) {
    using V = at::vec::Vectorized<T>;
    V sum[M][N];
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) sum[m][n] = V(0);
    for (long k = 0; k < inner; ++k) {
        V right[N];
        for (int n = 0; n < N; ++n) right[n] = V::loadu(b + (k * columns + n) * places, count);
        for (int m = 0; m < M; ++m) {
            const V left = V::loadu(a + (m * inner + k) * places, count);
            for (int n = 0; n < N; ++n) sum[m][n] = at::vec::fmadd(left, right[n], sum[m][n]);
        }
    }
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) sum[m][n].store(out + (m * columns + n) * places, count);
}
template <typename T, int M>
static inline void products_beside_rows(
    const T* a, const T* b, T* out, long inner, long columns, long places, int count) {
    long n = 0;
    for (; n + 3 <= columns; n += 3)
        products_beside_tile<T, M, 3>(a, b + n * places, out + n * places, inner, columns, places, count);
    for (; n < columns; ++n)
        products_beside_tile<T, M, 1>(a, b + n * places, out + n * places, inner, columns, places, count);
}
template <typename T>
static inline __attribute__((always_inline)) void products_beside(
    const T* a, const T* b, T* out, long rows, long row, long inner, long line) {
    constexpr int W = at::vec::Vectorized<T>::size();
    const long places = row / inner, columns = line / places, step = inner * places;
    for (long c = 0; c < places; c += W) {
        const int count = places - c < W ? places - c : W;
        long m = 0;
        for (; m + 4 <= rows; m += 4)
            products_beside_rows<T, 4>(a + m * step + c, b + c, out + m * line + c, inner, columns, places, count);
        for (; m < rows; ++m)
            products_beside_rows<T, 1>(a + m * step + c, b + c, out + m * line + c, inner, columns, places, count);
    }
}
