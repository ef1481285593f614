#!/bin/sh
# Install Debian packages where we may; otherwise say which are missing. Usage: COMMAND PACKAGE
# Nothing happens when COMMAND already works.
command="$1" package="$2"
sh -c "$command" >/dev/null 2>&1 && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing the system package $package"
    { apt-get install -qq -y "$package" || { apt-get update -qq && apt-get install -qq -y "$package"; }; } >/dev/null 2>&1
fi
sh -c "$command" >/dev/null 2>&1 && exit 0
echo "note: the system package $package is missing; install it with: sudo apt-get install $package"
