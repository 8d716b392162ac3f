/* Makes a clone another machine: the host writes a JSON object in one line to a port, and gets one back.
 *
 * `envd-identity DEVICE`, resident as root. Asked for (all optional): "time" (Unix seconds), "hostname", "machine_id"
 * (32 hexadecimal digits), "seed" (base64, mixed into the kernel's random numbers), "mac", "ssh" (true: new host keys
 * if there are any). Answers {"ok": true, "did": [...]} or {"ok": false, "did": [...], "error": "..."}.
 *
 * It is on the path of every reset, in C for one reason: an emulator that has just begun has to translate every
 * instruction it comes to, and Python comes to very many. All but SSH's keys is done by system calls. A request is a flat
 * object; strings have no escapes, since nothing that is asked for needs one.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <linux/random.h>
#include <math.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <net/route.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define INTERFACE "eth0"
#define LONGEST_REQUEST 65536

static char wrong[512]; /* what went wrong, in words; empty if nothing did */

static bool fail(const char *format, ...)
{
    va_list given;
    va_start(given, format);
    vsnprintf(wrong, sizeof wrong, format, given);
    va_end(given);
    return false;
}

/* Over what is there, without emptying it first: then ext4 has nothing to allocate, and no disk is waited for. */
static bool write_file(const char *path, const char *text)
{
    struct stat was;
    size_t length = strlen(text);
    int file = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
    bool written = file >= 0 && pwrite(file, text, length, 0) == (ssize_t)length && fstat(file, &was) == 0 &&
                   ((size_t)was.st_size == length || ftruncate(file, (off_t)length) == 0);
    if (!written)
        fail("%s: %s", path, strerror(errno));
    if (file >= 0)
        close(file);
    return written;
}

static bool set_seed(const char *text)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    union {
        struct rand_pool_info info;
        char room[sizeof(struct rand_pool_info) + 1024];
    } pool;
    unsigned char *seed = (unsigned char *)pool.info.buf;
    size_t length = 0;
    unsigned bits = 0, have = 0;
    for (; *text && *text != '='; text++) {
        const char *digit = strchr(digits, *text);
        if (!digit || length == 1024)
            return fail("a seed is base64, of 1024 bytes at most");
        bits = bits << 6 | (unsigned)(digit - digits);
        have += 6;
        if (have >= 8)
            seed[length++] = (unsigned char)(bits >> (have -= 8));
    }
    pool.info.entropy_count = (int)length * 8;
    pool.info.buf_size = (int)length;
    int urandom = open("/dev/urandom", O_WRONLY | O_CLOEXEC);
    bool mixed = urandom >= 0 && ioctl(urandom, RNDADDENTROPY, &pool.info) == 0 && ioctl(urandom, RNDRESEEDCRNG) == 0;
    if (!mixed)
        fail("/dev/urandom: %s", strerror(errno));
    if (urandom >= 0)
        close(urandom);
    return mixed;
}

static bool set_time(const char *text)
{
    char *end;
    double seconds = strtod(text, &end), whole;
    if (*end || seconds < 0)
        return fail("a time is a number of seconds");
    double part = modf(seconds, &whole);
    struct timespec now = {.tv_sec = (time_t)whole, .tv_nsec = (long)(part * 1e9)};
    return clock_settime(CLOCK_REALTIME, &now) == 0 || fail("clock: %s", strerror(errno));
}

static bool set_hostname(const char *name)
{
    char hosts[512], line[256];
    if (strlen(name) > 64 || !*name || strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789-") != strlen(name))
        return fail("a host name has up to 64 of a-z, 0-9 and -");
    if (sethostname(name, strlen(name)))
        return fail("host name: %s", strerror(errno));
    snprintf(line, sizeof line, "%s\n", name);
    snprintf(hosts, sizeof hosts, "127.0.0.1 localhost\n127.0.1.1 %s\n::1 localhost\n", name);
    return write_file("/etc/hostname", line) && write_file("/etc/hosts", hosts);
}

static bool set_machine_id(const char *number)
{
    char line[64];
    struct stat dbus;
    if (strlen(number) != 32 || strspn(number, "0123456789abcdef") != 32)
        return fail("a machine id has 32 hexadecimal digits");
    snprintf(line, sizeof line, "%s\n", number);
    if (!write_file("/etc/machine-id", line))
        return false;
    if (lstat("/var/lib/dbus/machine-id", &dbus) == 0 && S_ISLNK(dbus.st_mode))
        return true;
    return write_file("/var/lib/dbus/machine-id", line);
}

/* The default router, or 0. */
static in_addr_t current_router(void)
{
    char line[256], interface[32];
    unsigned to, router, found = 0;
    FILE *file = fopen("/proc/net/route", "r");
    while (file && !found && fgets(line, sizeof line, file))
        if (sscanf(line, "%31s %x %x", interface, &to, &router) == 3 && to == 0 && strcmp(interface, INTERFACE) == 0)
            found = router;
    if (file)
        fclose(file);
    return found;
}

static bool change_address_of_a_card_that_must_be_down(int control, struct ifreq *wanted)
{
    struct ifreq flags = {.ifr_name = INTERFACE};
    in_addr_t router = current_router();
    if (ioctl(control, SIOCGIFFLAGS, &flags))
        return false;
    flags.ifr_flags &= ~IFF_UP;
    if (ioctl(control, SIOCSIFFLAGS, &flags))
        return false;
    bool changed = ioctl(control, SIOCSIFHWADDR, wanted) == 0;
    int why = errno;
    flags.ifr_flags |= IFF_UP;
    ioctl(control, SIOCSIFFLAGS, &flags);
    if (router) {
        struct rtentry route = {.rt_flags = RTF_UP | RTF_GATEWAY};
        ((struct sockaddr_in *)&route.rt_dst)->sin_family = AF_INET;
        ((struct sockaddr_in *)&route.rt_genmask)->sin_family = AF_INET;
        ((struct sockaddr_in *)&route.rt_gateway)->sin_family = AF_INET;
        ((struct sockaddr_in *)&route.rt_gateway)->sin_addr.s_addr = router;
        ioctl(control, SIOCADDRT, &route);
    }
    errno = why;
    return changed;
}

/* Its address and routes stay, and others are told of the new one (arp_notify, set when the network came up). */
static bool set_mac(const char *text)
{
    struct ifreq wanted = {.ifr_name = INTERFACE, .ifr_hwaddr = {.sa_family = ARPHRD_ETHER}};
    unsigned char *octet = (unsigned char *)wanted.ifr_hwaddr.sa_data;
    if (strlen(text) != 17 || sscanf(text, "%2hhx:%2hhx:%2hhx:%2hhx:%2hhx:%2hhx", octet, octet + 1, octet + 2, octet + 3,
                                     octet + 4, octet + 5) != 6)
        return fail("a MAC has 6 octets");
    int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    bool changed = control >= 0 && (ioctl(control, SIOCSIFHWADDR, &wanted) == 0 ||
                                    change_address_of_a_card_that_must_be_down(control, &wanted));
    if (!changed)
        fail("%s: %s", INTERFACE, strerror(errno));
    if (control >= 0)
        close(control);
    return changed;
}

static bool renew_ssh_keys(const char *wanted)
{
    glob_t keys;
    if (strcmp(wanted, "true") != 0 || glob("/etc/ssh/ssh_host_*", 0, NULL, &keys) != 0)
        return true;
    for (size_t index = 0; index < keys.gl_pathc; index++)
        unlink(keys.gl_pathv[index]);
    globfree(&keys);
    pid_t child = fork();
    if (child == 0) {
        execl("/usr/bin/ssh-keygen", "ssh-keygen", "-q", "-A", (char *)NULL);
        _exit(127);
    }
    int status = -1;
    if (child > 0)
        waitpid(child, &status, 0);
    return status == 0 || fail("ssh-keygen -A ended with status %d", status);
}

/* In this order: the seed before what may draw from it, the clock before files that are dated by it. */
static const struct {
    const char *name;
    bool (*become)(const char *value);
} does[] = {
    {"seed", set_seed},     {"time", set_time}, {"hostname", set_hostname}, {"machine_id", set_machine_id},
    {"mac", set_mac}, {"ssh", renew_ssh_keys},
};
#define ASKABLE (sizeof does / sizeof *does)

static char *blank(char *at)
{
    while (isspace((unsigned char)*at))
        at++;
    return at;
}

/* Ends the string that begins at `at` (a quote) and returns what follows it; NULL if it is none. */
static char *unquote(char *at, char **text)
{
    if (*at != '"')
        return NULL;
    *text = ++at;
    at += strcspn(at, "\"\\");
    if (*at != '"')
        return NULL;
    *at = 0;
    return at + 1;
}

/* Points values[i] at what is asked of does[i]. Destroys `line`. */
static bool parse(char *line, const char *values[ASKABLE])
{
    const char *shape = "a request is a flat JSON object";
    char *at = blank(line);
    if (*at++ != '{')
        return fail("%s", shape);
    if (*(at = blank(at)) == '}')
        return true;
    for (;;) {
        char *name, *value, next;
        at = unquote(at, &name);
        if (!at || *(at = blank(at)) != ':')
            return fail("%s", shape);
        at = blank(at + 1);
        if (*at == '"') {
            if (!(at = unquote(at, &value)))
                return fail("%s", shape);
            next = *(at = blank(at));
        } else {
            char *end = value = at;
            end += strcspn(end, ",} \t");
            next = *(at = blank(end));
            *end = 0;
        }
        for (size_t index = 0; index < ASKABLE; index++)
            if (strcmp(name, does[index].name) == 0)
                values[index] = value;
        if (next == '}')
            return true;
        if (next != ',')
            return fail("%s", shape);
        at = blank(at + 1);
    }
}

/* Do what a request asks, as far as it can be done; the answer, which is valid until the next. */
static const char *become(char *line)
{
    static char answer[1024];
    const char *values[ASKABLE] = {0};
    char did[256] = "";
    wrong[0] = 0;
    bool ok = parse(line, values);
    for (size_t index = 0; ok && index < ASKABLE; index++) {
        if (!values[index] || strcmp(values[index], "null") == 0)
            continue;
        ok = does[index].become(values[index]);
        if (ok)
            snprintf(did + strlen(did), sizeof did - strlen(did), "%s\"%s\"", *did ? ", " : "", does[index].name);
    }
    for (char *at = wrong; *at; at++)
        if (*at == '"' || *at == '\\' || !isprint((unsigned char)*at))
            *at = ' ';
    if (ok)
        snprintf(answer, sizeof answer, "{\"ok\": true, \"did\": [%s]}\n", did);
    else
        snprintf(answer, sizeof answer, "{\"ok\": false, \"did\": [%s], \"error\": \"%s\"}\n", did, wrong);
    return answer;
}

/* Answer for ever. A port whose other end nobody holds reads as ended; a signal tells when somebody does. */
int main(int count, char **given)
{
    static char held[LONGEST_REQUEST + 1];
    size_t length = 0;
    sigset_t signals;
    if (count != 2) {
        fprintf(stderr, "usage: %s DEVICE\n", given[0]);
        return 2;
    }
    prctl(PR_SET_NAME, "envd-identity");
    sigemptyset(&signals);
    sigaddset(&signals, SIGIO);
    sigprocmask(SIG_BLOCK, &signals, NULL);
    int port = open(given[1], O_RDWR | O_CLOEXEC);
    if (port < 0) {
        perror(given[1]);
        return 1;
    }
    fcntl(port, F_SETOWN, getpid());
    fcntl(port, F_SETFL, fcntl(port, F_GETFL) | O_ASYNC);
    for (;;) {
        ssize_t got = read(port, held + length, LONGEST_REQUEST - length);
        if (got <= 0) {
            if (got < 0 && errno == EINTR)
                continue;
            length = 0;
            sigwaitinfo(&signals, NULL);
            continue;
        }
        length += (size_t)got;
        held[length] = 0;
        char *line = held, *end;
        while ((end = memchr(line, '\n', length - (size_t)(line - held)))) {
            *end = 0;
            const char *answer = become(line);
            if (write(port, answer, strlen(answer)) < 0)
                break;
            line = end + 1;
        }
        length -= (size_t)(line - held);
        memmove(held, line, length);
        if (length == LONGEST_REQUEST)
            length = 0; /* no line is so long */
    }
}
