SUMMARY = "Unlocks and mounts encrypted removable media with keys of the NXP CAAM"
DESCRIPTION = "A daemon that unlocks and mounts an encrypted SD card, USB stick or data cartridge \
when it is plugged in, with a key that the CAAM has sealed for this board, and takes everything \
away when it is pulled."
SECTION = "base"
LICENSE = "MIT"
LIC_FILES_CHKSUM = "file://LICENSE;md5=1ff228d1c253547815bb8060a62e1707"

inherit externalsrc features_check python3native systemd useradd

# The source tree that this layer is a part of.
EXTERNALSRC = "${@os.path.abspath(os.path.join(d.getVar('THISDIR'), *[os.pardir] * 4))}"
EXTERNALSRC_SYMLINKS = ""

REQUIRED_DISTRO_FEATURES = "systemd"

do_configure[noexec] = "1"
do_compile[noexec] = "1"

# lvm2 of meta-oe calls its rules 10-dm.rules, and ours have to come before. The bytecode is made
# here, as the root filesystem may be read-only.
do_install() {
    oe_runmake -C ${S} install DESTDIR=${D} PREFIX=${prefix} SYSCONFDIR=${sysconfdir} \
        UNITDIR=${systemd_system_unitdir} UDEVDIR=${nonarch_base_libdir}/udev/rules.d \
        UDEV_RULE=09-caam-hotplug.rules COMPILE_WITH=${PYTHON}
}

FILES:${PN} += " \
    ${prefix}/lib/caam-hotplug \
    ${prefix}/lib/sysusers.d \
    ${nonarch_base_libdir}/udev/rules.d \
    ${systemd_system_unitdir} \
    ${datadir} \
"
CONFFILES:${PN} = "${sysconfdir}/caam-hotplug/agent.toml"

SYSTEMD_SERVICE:${PN} = "caam-hotplug.service caam-hotplug-holders.socket caam-hotplug-sleep.service"

USERADD_PACKAGES = "${PN}"
GROUPADD_PARAM:${PN} = "--system caam-hotplug"

# libdevmapper is a package of lvm2. Python's own are those of its manifest.
RDEPENDS:${PN} = " \
    keyutils \
    libdevmapper \
    libudev \
    python3-asyncio \
    python3-compression \
    python3-core \
    python3-crypt \
    python3-ctypes \
    python3-difflib \
    python3-fcntl \
    python3-io \
    python3-json \
    python3-logging \
    python3-mmap \
    python3-netclient \
    python3-pyudev \
    python3-resource \
    python3-shell \
    python3-stringold \
    python3-threading \
    python3-tomllib \
    util-linux-libblkid \
"
# Without D-Bus the agent does the rest of its job, as it does without device-mapper's udev rules.
# Only `provision` needs libfdisk, and a program that makes filesystems.
RRECOMMENDS:${PN} = "dbus e2fsprogs-mke2fs lvm2-udevrules python3-sdbus util-linux-libfdisk"
