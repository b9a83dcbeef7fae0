/* The service that is migrated, alone in its container (static, no shell around it).
 *
 * Every 20 ms it appends the next number to /log and makes it durable; it answers every line that a TCP client sends to
 * port 9000 with that line and the last number that is durable; and now and then it reads a random page of the files in
 * /data, of which it will never have touched more than a small part. So a lost write, a write done twice, a jump in time
 * and a disk that is not all there would all show.
 * With a second argument it also overwrites so many random pages of /churn in each of these 20 ms, for nobody to read: a disk
 * that is in use.
 * With a third argument it holds so many MiB of memory. Of the first MiB it writes a page in each of these 20 ms; all of it is
 * looked at again and again, and memory that is not as it was left ends the service.
 *
 *   service IP [PAGES [MIB]]
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { TICK_MS = 20, TICKS_A_READ = 5, MAX_CLIENTS = 15, PAGE = 4096, LINE = 256, WORDS = PAGE / 8, BUSY = 256, LOOKS = 64 };

static void die(const char *what) {
    perror(what);
    exit(1);
}

static int64_t now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static void append(int log, unsigned long number) {
    char line[32];
    int length = snprintf(line, sizeof line, "%lu\n", number);
    if (write(log, line, length) != length) die("cannot write /log");
    if (fdatasync(log) != 0) die("cannot sync /log");
}

/* Started anew, it goes on from what is durable; a line that was cut short is cut off. */
static unsigned long last_number(int log) {
    char tail[64];
    off_t size = lseek(log, 0, SEEK_END), from = size > (off_t)sizeof tail - 1 ? size - (off_t)sizeof tail + 1 : 0;
    ssize_t got = pread(log, tail, sizeof tail - 1, from);
    if (got <= 0) return 0;
    tail[got] = 0;
    char *last = strrchr(tail, '\n');
    if (!last) return 0;
    if (ftruncate(log, from + (last - tail) + 1) != 0) die("cannot cut /log");
    *last = 0;
    char *before = strrchr(tail, '\n');
    return strtoul(before ? before + 1 : tail, NULL, 10);
}

static off_t some_page(off_t size, uint64_t *random) {
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    return (off_t)(*random % (uint64_t)(size / PAGE)) * PAGE;
}

/* Reads a page of a file that is likely not to have been read before. */
static void touch(int data, off_t size, uint64_t *random) {
    char page[PAGE];
    if (pread(data, page, PAGE, some_page(size, random)) != PAGE) die("cannot read /data/0");
}

static void overwrite(int churn, off_t size, long pages, uint64_t *random) {
    for (uint64_t page[PAGE / 8]; pages > 0; pages--) {
        off_t offset = some_page(size, random);
        for (int i = 0; i < PAGE / 8; i++) page[i] = *random * (2 * i + 1);
        if (pwrite(churn, page, PAGE, offset) != PAGE) die("cannot write /churn");
    }
}

/* The memory: the first BUSY pages are written in turn, one a tick, the others never again. */
static uint64_t *memory;
static size_t held;

static uint64_t quiet(size_t word) { return (word + 1) * 0x9e3779b97f4a7c15u; }

static void hold(size_t mib) {
    held = mib << 20 >> 12;
    memory = aligned_alloc(PAGE, held * PAGE);
    if (!memory) die("cannot hold the memory");
    for (size_t word = 0; word < held * WORDS; word++) memory[word] = word < BUSY * WORDS ? 0 : quiet(word);
}

static void look(unsigned long number) {
    uint64_t *page = memory + number % BUSY * WORDS;
    /* Written a turn ago, or never since this began. */
    if (page[0] && page[0] != number - BUSY) die("the memory is of another time");
    page[0] = number;
    for (size_t i = 0; i < LOOKS; i++) {
        size_t at = BUSY + (number * LOOKS + i) % (held - BUSY);
        for (size_t word = at * WORDS; word < (at + 1) * WORDS; word++)
            if (memory[word] != quiet(word)) die("the memory has changed");
    }
}

struct client {
    int used;
    char line[LINE];
};

/* Answers what has arrived; returns 0 when the client is gone. */
static int answer(int socket, struct client *client, unsigned long number) {
    ssize_t got = read(socket, client->line + client->used, LINE - 1 - client->used);
    if (got <= 0) return got < 0 && (errno == EAGAIN || errno == EINTR);
    client->used += got;
    client->line[client->used] = 0;
    for (char *end; (end = strchr(client->line, '\n'));) {
        char reply[LINE + 32];
        *end = 0;
        int length = snprintf(reply, sizeof reply, "%s %lu\n", client->line, number);
        if (send(socket, reply, length, MSG_NOSIGNAL) != length) return 0;
        client->used -= end + 1 - client->line;
        memmove(client->line, end + 1, client->used + 1);
    }
    return client->used < LINE - 1;
}

int main(int argc, char **argv) {
    if (argc < 2 || argc > 4) {
        fprintf(stderr, "usage: service IP [PAGES [MIB]]\n");
        return 2;
    }
    int log = open("/log", O_RDWR | O_CREAT | O_APPEND, 0644);
    if (log < 0) die("cannot open /log");
    unsigned long number = last_number(log);
    int data = open("/data/0", O_RDONLY);
    struct stat stat;
    if (data < 0 || fstat(data, &stat) != 0) die("cannot open /data/0");
    long pages = argc > 2 ? atol(argv[2]) : 0;
    if (argc > 3 && atol(argv[3]) > 1) hold(atol(argv[3]));
    int churn = pages > 0 ? open("/churn", O_RDWR) : -1;
    struct stat churned;
    if (pages > 0 && (churn < 0 || fstat(churn, &churned) != 0)) die("cannot open /churn");

    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(9000)};
    struct pollfd polls[1 + MAX_CLIENTS];
    static struct client clients[1 + MAX_CLIENTS];
    int count = 1, on = 1;
    polls[0] = (struct pollfd){.fd = socket(AF_INET, SOCK_STREAM, 0), .events = POLLIN};
    setsockopt(polls[0].fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (inet_pton(AF_INET, argv[1], &address.sin_addr) != 1) die("not an address");
    if (bind(polls[0].fd, (void *)&address, sizeof address) || listen(polls[0].fd, 8)) die("cannot listen");

    uint64_t random = 88172645463325252u;
    int64_t next = now_ms();
    for (;;) {
        int64_t left = next - now_ms();
        if (left <= 0) {
            append(log, ++number);
            if (held) look(number);
            if (pages > 0) overwrite(churn, churned.st_size, pages, &random);
            if (number % TICKS_A_READ == 0) touch(data, stat.st_size, &random);
            next = now_ms() + TICK_MS;
            continue;
        }
        if (poll(polls, count, (int)left) <= 0) continue;
        for (int i = count - 1; i > 0; i--) {
            if (!polls[i].revents || answer(polls[i].fd, &clients[i], number)) continue;
            close(polls[i].fd);
            count--;
            polls[i] = polls[count];
            clients[i] = clients[count];
        }
        if (polls[0].revents & POLLIN) {
            int client = accept(polls[0].fd, NULL, NULL);
            if (client >= 0 && count > MAX_CLIENTS) {
                close(client);
            } else if (client >= 0) {
                setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
                fcntl(client, F_SETFL, O_NONBLOCK);
                clients[count].used = 0;
                polls[count++] = (struct pollfd){.fd = client, .events = POLLIN};
            }
        }
    }
}
