/* The client that talks to the service all the while, over one TCP connection, and measures what a user would notice.
 *
 *   client IP REPLY_TIMEOUT_MS [FILE]
 *
 * Sends a numbered line, waits for its reply, pauses for 50 ms, and so on. Ends by SIGTERM with one line of JSON:
 *   replies         how many replies came
 *   lost            requests that never got theirs (the connection broke, or the reply timeout passed)
 *   connections     how often it had to connect; 1 means that the connection lived through all
 *   longest_gap_ms  the longest time between a reply and the next one
 *   last_number     the highest number that the service called durable
 * FILE gets a line for each reply: when it came, in milliseconds since 1970, and what it took.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PAUSE_MS = 50, CONNECT_MS = 500, LINE = 256 };

static volatile sig_atomic_t stopped;
static void stop(int signal) {
    (void)signal;
    stopped = 1;
}

static int64_t now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static void rest(int ms) {
    struct timespec t = {.tv_nsec = ms * 1000000L};
    nanosleep(&t, NULL);
}

/* Waits for events until the deadline or SIGTERM. */
static int ready(int socket, short events, int64_t deadline) {
    while (!stopped) {
        int64_t left = deadline - now_ms();
        if (left <= 0) return 0;
        struct pollfd poll_one = {.fd = socket, .events = events};
        if (poll(&poll_one, 1, left > 100 ? 100 : (int)left) > 0) return 1;
    }
    return 0;
}

static int dial(const struct sockaddr_in *address) {
    int error = 0, on = 1, s = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    socklen_t size = sizeof error;
    if (connect(s, (const void *)address, sizeof *address) == 0 ||
        (errno == EINPROGRESS && ready(s, POLLOUT, now_ms() + CONNECT_MS) &&
         getsockopt(s, SOL_SOCKET, SO_ERROR, &error, &size) == 0 && error == 0)) {
        setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        /* One small packet in flight: try again every 0.2 s, instead of ever more seldom, while the other side is frozen. */
        setsockopt(s, IPPROTO_TCP, TCP_THIN_LINEAR_TIMEOUTS, &on, sizeof on);
        return s;
    }
    close(s);
    return -1;
}

/* Sends request number `request` and waits for its reply. 0: the connection is of no use any more. */
static int ask(int socket, unsigned long request, int64_t deadline, unsigned long *number) {
    char line[LINE];
    int used = 0, length = snprintf(line, sizeof line, "%lu\n", request);
    if (send(socket, line, length, MSG_NOSIGNAL) != length) return 0;
    while (ready(socket, POLLIN, deadline)) {
        ssize_t got = read(socket, line + used, LINE - 1 - used);
        if (got < 0 && (errno == EAGAIN || errno == EINTR)) continue;
        if (got <= 0) return 0;
        used += got;
        line[used] = 0;
        if (strchr(line, '\n')) {
            unsigned long echoed;
            return sscanf(line, "%lu %lu", &echoed, number) == 2 && echoed == request;
        }
        if (used == LINE - 1) return 0;
    }
    return 0;
}

int main(int argc, char **argv) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(9000)};
    if (argc < 3 || argc > 4 || inet_pton(AF_INET, argv[1], &address.sin_addr) != 1) {
        fprintf(stderr, "usage: client IP REPLY_TIMEOUT_MS [FILE]\n");
        return 2;
    }
    FILE *replies_file = argc > 3 ? fopen(argv[3], "w") : NULL;
    if (argc > 3 && !replies_file) {
        perror(argv[3]);
        return 1;
    }
    int64_t timeout = atoll(argv[2]), last = -1, longest = 0;
    unsigned long request = 0, replies = 0, lost = 0, connections = 0, highest = 0;
    struct sigaction action = {.sa_handler = stop};
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);

    for (int socket = -1; !stopped;) {
        if (socket < 0) {
            socket = dial(&address);
            if (socket < 0)
                rest(PAUSE_MS);
            else
                connections++;
            continue;
        }
        unsigned long number = 0;
        int64_t asked = now_ms();
        if (ask(socket, ++request, asked + timeout, &number)) {
            int64_t now = now_ms();
            if (replies_file) {
                struct timespec t;
                clock_gettime(CLOCK_REALTIME, &t);
                fprintf(replies_file, "%lld %lld\n", (long long)t.tv_sec * 1000 + t.tv_nsec / 1000000, (long long)(now - asked));
            }
            if (last >= 0 && now - last > longest) longest = now - last;
            last = now;
            replies++;
            if (number > highest) highest = number;
            rest(PAUSE_MS);
        } else if (stopped) {
            request--; /* told to stop while one was on its way: neither answered nor lost */
        } else {
            lost++;
            close(socket);
            socket = -1;
        }
    }
    if (replies_file) fclose(replies_file);
    /* A gap that is still open counts as well. */
    if (last >= 0 && now_ms() - last > longest) longest = now_ms() - last;
    printf("{\"replies\":%lu,\"lost\":%lu,\"connections\":%lu,\"longest_gap_ms\":%lld,\"last_number\":%lu}\n", replies, lost,
           connections, (long long)longest, highest);
    return 0;
}
