# shellcheck shell=bash
# shellcheck disable=SC2034  # variables are for the scripts that source this
# What the launch scripts share; sourced by them.

die() {
    echo "$(basename "$0"): $*" >&2
    exit 2
}

# The command as one line that a shell can run.
quote() {
    local line
    printf -v line '%q ' "$@"
    echo "${line% }"
}

# Runs a command, or with --dry-run prints it.
run() {
    if [ "${dry_run:-}" ]; then quote "$@"; else "$@"; fi
}

# Waits for a process of ours, and sets `code`. A trapped signal ends `wait` early: it is asked again at the end.
wait_out() { # PID
    while kill -0 "$1" 2>/dev/null; do wait "$1" || true; done
    code=0
    wait "$1" || code=$?
}

# What follows an option, given the words from the option on.
value() {
    [ -n "${2:-}" ] || die "$1: give a value"
    printf '%s' "$2"
}

check_name() { # NAME: it becomes the name of resources
    [[ $1 =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || die "NAME '$1': small letters, digits and -, at most 40"
}

whole_number() { # OPTION VALUE
    [[ $2 =~ ^[1-9][0-9]*$ ]] || die "$1 '$2': give a whole number, at least 1"
}

# Topologies are written as for `posttrain plan`: v5p:4x4x4. Sets generation, shape, chips, per_host (chips) and hosts.
read_topology() {
    [[ $1 =~ ^(v4|v5e|v5p|v6e|tpu7x):([1-9][0-9]*(x[1-9][0-9]*){1,2})$ ]] ||
        die "--topology '$1': give a chip and its shape as for posttrain plan, like v5p:4x4x4; chips: v4 v5e v5p v6e tpu7x"
    generation=${BASH_REMATCH[1]} shape=${BASH_REMATCH[2]}
    chips=$((${shape//x/*}))
    per_host=$((chips < 4 ? chips : 4))
    hosts=$((chips / per_host))
    [ $((hosts * per_host)) -eq "$chips" ] || die "--topology '$1': $chips chips are no whole number of hosts with 4"
}
