/* Preloaded into adbd, which listens on every interface and on vsock: it gets 127.0.0.1 alone. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>

int socket(int domain, int type, int protocol)
{
    int (*next)(int, int, int) = dlsym(RTLD_NEXT, "socket");
    if (domain == AF_INET || domain == AF_INET6 || domain == AF_UNIX)
        return next(domain, type, protocol);
    errno = EAFNOSUPPORT;
    return -1;
}

int bind(int socket, const struct sockaddr *wanted, socklen_t size)
{
    int (*next)(int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "bind");
    struct sockaddr_storage own = {0};
    memcpy(&own, wanted, size < sizeof own ? size : sizeof own);
    if (own.ss_family == AF_INET)
        ((struct sockaddr_in *)&own)->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (own.ss_family == AF_INET6) {
        /* ::ffff:127.0.0.1 */
        static const unsigned char mapped[16] = {[10] = 255, [11] = 255, [12] = 127, [15] = 1};
        memcpy(&((struct sockaddr_in6 *)&own)->sin6_addr, mapped, sizeof mapped);
    }
    return next(socket, (struct sockaddr *)&own, size);
}
