#!/bin/sh
# fetch.sh DIR: brings the Debian packages that the small guest is made of into DIR; none of them is installed.
# Does nothing when the newest that apt knows of are there. `cargo xtask setup` calls it.
set -eu
mkdir -p "$1"
cd "$1"

complete() {
  [ -s wanted ] || return 1
  while read -r name; do [ -s "$name" ] || return 1; done < wanted
}
# apt has learnt nothing new since.
if [ wanted -nt /var/lib/apt/lists ] && complete; then exit 0; fi

# The agent and the libraries below it; the shell; what makes a disk that boots by itself, with the one library more
# that its tool asks for.
# Perl comes in only through the packages' own scripts, which never run.
agent=$(apt-cache depends --recurse --important qemu-guest-agent | grep -E '^(lib|qemu-guest-agent)' |
  grep -vE 'perl|gdbm|libdb' | sort -u)
# The libraries of the release itself, whatever newer ones the machine carries: they must fit each other.
release=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
libraries=$(for name in $agent busybox-static grub-common grub-pc-bin libdevmapper1.02.1; do echo "$name${release:+/$release}"; done)
kernel=$(apt-cache depends --important linux-image-cloud-amd64 |
  sed -n 's/.*Depends: \(linux-image-[0-9][^ ]*\)$/\1/p' | head -n 1)
[ -n "$kernel" ] || { echo "apt knows no linux-image-cloud-amd64" >&2; exit 1; }

# Aside, so that neither a download cut short nor what is here already is taken for the whole.
rm -rf new
mkdir new
trap 'rm -rf new' EXIT
cd new
# shellcheck disable=SC2086 # lists of words
apt-get download --print-uris $kernel $libraries | awk '{ print $2 }' | sort > wanted
grep -q '^qemu-guest-agent_' wanted || { echo "apt cannot download a qemu-guest-agent" >&2; exit 1; }
if cmp -s wanted ../wanted && (cd .. && complete); then
  touch ../wanted
  exit 0
fi
# shellcheck disable=SC2086
apt-get download --quiet $kernel $libraries
cd ..
rm -f wanted ./*.deb
mv new/*.deb .
mv new/wanted .
