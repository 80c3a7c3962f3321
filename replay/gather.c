/* Copies rows of all columns in one call. Wide runs bypass the cache and move several pages at a time: one
   page after the other leaves the memory idle while each page's first lines are fetched. */

#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

enum { LINE = 64, PAGE = 4096, PAGES = 4, STREAM_NBYTES = 256 << 10 };

#if defined(__SSE2__)
static void stream(char *to, const char *from, int64_t nbytes) {
    int64_t head = -(uintptr_t)to & (LINE - 1);
    memcpy(to, from, (size_t)head);
    int64_t done = head;
    for (; done + PAGES * PAGE <= nbytes; done += PAGES * PAGE)
        for (int64_t line = 0; line < PAGE; line += LINE)
            for (int64_t page = 0; page < PAGES; page++) {
                int64_t at = done + page * PAGE + line;
                const __m128i *source = (const __m128i *)(from + at);
                __m128i *target = (__m128i *)(to + at);
                for (int i = 0; i < LINE / 16; i++)
                    _mm_stream_si128(target + i, _mm_loadu_si128(source + i));
            }
    memcpy(to + done, from + done, (size_t)(nbytes - done));
    _mm_sfence();
}
#else
static void stream(char *to, const char *from, int64_t nbytes) { memcpy(to, from, (size_t)nbytes); }
#endif

/* Row `at` on of each `to[c]` becomes rows first .. first + count - 1 of `from[c]`, nbytes[c] bytes each. */
void gather(int64_t columns, char *const *to, char *const *from, const int64_t *nbytes, int64_t at,
            int64_t first, int64_t count) {
    for (int64_t c = 0; c < columns; c++) {
        char *target = to[c] + at * nbytes[c];
        const char *source = from[c] + first * nbytes[c];
        int64_t total = count * nbytes[c];
        if (total >= STREAM_NBYTES)
            stream(target, source, total);
        else
            memcpy(target, source, (size_t)total);
    }
}
