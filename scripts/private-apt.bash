# Sourced by the scripts that fetch Debian packages without installing them: an apt of our own (lists, cache, sources,
# status) that uses the mirrors and keys of the system's apt and leaves the system's apt as it is.
# Where to start: private_apt_open, then `papt …`.
# shellcheck shell=bash

# What we keep between runs. QEMU runs under a uid of its own, so root's home (mode 0700) is no place for it.
godwit_cache() {
    if [ -n "${GODWIT_CACHE:-}" ]; then
        printf '%s\n' "$GODWIT_CACHE"
    elif [ "$(id -u)" -eq 0 ] && [ -z "${XDG_CACHE_HOME:-}" ]; then
        printf '/var/cache/godwit\n'
    else
        printf '%s/godwit\n' "${XDG_CACHE_HOME:-$HOME/.cache}"
    fi
}

# The directory $1 and all above it, as far as others cannot pass through them.
closed_to_others() {
    local dir
    dir=$(realpath "$1")
    while [ "$dir" != / ]; do
        case $(stat -c %A "$dir") in *[xt]) ;; *) printf '%s\n' "$dir" ;; esac
        dir=$(dirname "$dir")
    done
}

debian_codename() { sed -n 's/^VERSION_CODENAME=//p' /etc/os-release; }

# Prints "URI SUITE" for every enabled binary source of the system.
system_sources() {
    local file
    for file in /etc/apt/sources.list.d/*.sources; do
        [ -e "$file" ] || continue
        awk 'BEGIN { RS = ""; FS = "\n" }
            {
                uris = suites = types = ""; enabled = 1; key = ""
                for (i = 1; i <= NF; i++) {
                    line = $i
                    if (line ~ /^#/) continue
                    if (line ~ /^[A-Za-z-]+:/) {
                        key = tolower(line); sub(/:.*/, "", key); sub(/^[^:]*:[ \t]*/, "", line)
                    }
                    if (key == "uris") uris = uris " " line
                    if (key == "suites") suites = suites " " line
                    if (key == "types") types = types " " line " "
                    if (key == "enabled" && tolower(line) ~ /^(no|false|0)/) enabled = 0
                }
                if (!enabled || types !~ / deb /) next
                n = split(uris, u, " "); m = split(suites, s, " ")
                for (i = 1; i <= n; i++) for (j = 1; j <= m; j++) print u[i], s[j]
            }' "$file"
    done
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
        [ -e "$file" ] || continue
        sed -n -E 's/^deb[ \t]+(\[[^]]*\][ \t]+)?([^ \t]+)[ \t]+([^ \t]+).*/\2 \3/p' "$file"
    done
}

# private_apt_open SUITE…: an apt that knows the system's Debian mirrors for its own release, and the named suites besides.
# Sets `private_apt` (its directory). Call under a lock: two at once would share it.
private_apt_open() {
    local codename keyring=/usr/share/keyrings/debian-archive-keyring.gpg uri suite archive='' extra
    codename=$(debian_codename)
    [ -e "$keyring" ] || keyring=${keyring%.gpg}.pgp
    [ -e "$keyring" ] || { echo "$keyring is missing: run scripts/setup" >&2; return 1; }
    private_apt=$(godwit_cache)/apt
    mkdir -p "$private_apt"/{lists/partial,archives/partial}
    : >"$private_apt/sources.list"
    while read -r uri suite; do
        case $suite in
        "$codename") archive=${archive:-$uri} ;;
        "$codename"-updates | "$codename"-security) ;;
        *) continue ;; # other people's repositories, and what we were not asked for
        esac
        printf 'deb [signed-by=%s] %s %s main\n' "$keyring" "$uri" "$suite" >>"$private_apt/sources.list"
    done < <(system_sources)
    [ -n "$archive" ] || { echo "the apt sources of this system name no mirror of Debian $codename" >&2; return 1; }
    for extra in "$@"; do
        printf 'deb [signed-by=%s] %s %s main\n' "$keyring" "$archive" "$extra" >>"$private_apt/sources.list"
    done
    # QEMU and its firmware count as not installed: what is unpacked beside them must be complete, whatever the system has.
    awk 'BEGIN { RS = ""; ORS = "\n\n" } $0 !~ /(^|\n)Package: (qemu|seabios|ipxe-qemu)/' \
        /var/lib/dpkg/status >"$private_apt/status"
    # Proxies and credentials of the system's apt (apt.conf.d, auth.conf.d) stay in force; its hooks do not.
    cat >"$private_apt/apt.conf" <<CONF
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Pre-Invoke;
#clear DPkg::Post-Invoke;
#clear DPkg::Pre-Install-Pkgs;
#clear APT::Default-Release;
Dir::Etc::sourcelist "$private_apt/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State "$private_apt";
Dir::State::lists "$private_apt/lists";
Dir::State::status "$private_apt/status";
Dir::State::extended_states "$private_apt/extended_states";
Dir::Cache "$private_apt";
Dir::Cache::archives "$private_apt/archives";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
Dir::Log "$private_apt";
Acquire::Languages "none";
APT::Sandbox::User "root";
Debug::NoLocking "true";
CONF
    # A suite that the mirror lacks shows here, as an error.
    papt apt-get -qq -o APT::Update::Error-Mode=any update
}

# papt COMMAND ARGUMENT…: an apt command with the private configuration.
papt() {
    local command=$1
    shift
    "$command" -c "$private_apt/apt.conf" "$@"
}
