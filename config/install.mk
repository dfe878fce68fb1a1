# Files of an installation and their places: one list for `make install`, `make uninstall`, the Debian
# package and the recipe. A pattern that no file matches installs nothing.
#
#     make install [DESTDIR=STAGE] [PREFIX=/usr]

DESTDIR =
PREFIX = /usr
SYSCONFDIR = /etc
BINDIR = $(PREFIX)/bin
HOMEDIR = $(PREFIX)/lib/caam-hotplug
DATADIR = $(PREFIX)/share
# systemd and udevd read below /usr, /usr/local and /etc; dbus-daemon below /usr and /etc only.
SYSTEMDIR = $(if $(filter /usr /usr/local,$(PREFIX)),$(PREFIX)/lib,$(SYSCONFDIR))
UNITDIR = $(SYSTEMDIR)/systemd/system
SYSUSERSDIR = $(SYSTEMDIR)/sysusers.d
UDEVDIR = $(SYSTEMDIR)/udev/rules.d
DBUSDIR = $(if $(filter /usr,$(PREFIX)),$(DATADIR),$(SYSCONFDIR))/dbus-1/system.d
# It must sort before device-mapper's own: 55-dm.rules on Debian, 10-dm.rules elsewhere.
UDEV_RULE = 50-caam-hotplug.rules
ZSHDIR = $(DATADIR)/zsh/site-functions
# Python that the bytecode is made for. None for a stage, whose Python is unknown here.
COMPILE_WITH = $(if $(DESTDIR),,/usr/bin/python3)

# A word is SOURCE=TARGET.
into = $(foreach file,$(wildcard $2),$(file)=$(strip $1)/$(notdir $(file)))
as = $(foreach file,$(wildcard $2),$(file)=$(strip $1))

PACKAGE_FILES = $(shell cd agent && find caam_hotplug -type f ! -path '*/__pycache__/*' | sort)

FILES = \
  $(foreach file,$(PACKAGE_FILES),agent/$(file)=$(HOMEDIR)/$(file)) \
  $(call into,$(UNITDIR),config/caam-hotplug*.service config/caam-hotplug*.socket) \
  $(call as,$(UDEVDIR)/$(UDEV_RULE),rules/50-caam-hotplug.rules) \
  $(call as,$(SYSUSERSDIR)/caam-hotplug.conf,config/sysusers.conf) \
  $(call into,$(DATADIR)/caam-hotplug,config/agent.toml config/*.schema.json) \
  $(call into,$(DBUSDIR),config/org.*.conf) \
  $(call into,$(DATADIR)/dbus-1/system-services,config/org.*.service) \
  $(call into,$(DATADIR)/dbus-1/interfaces,config/org.*.xml) \
  $(call into,$(DATADIR)/polkit-1/actions,config/org.*.policy) \
  $(foreach n,1 5 8,$(call into,$(DATADIR)/man/man$(n),docs/man/*.$(n))) \
  $(call as,$(DATADIR)/bash-completion/completions/caam-hotplug,config/completions/caam-hotplug.bash) \
  $(call as,$(ZSHDIR)/_caam-hotplug,config/completions/_caam-hotplug config/completions/caam-hotplug.zsh) \
  $(call as,$(DATADIR)/fish/vendor_completions.d/caam-hotplug.fish,config/completions/caam-hotplug.fish)
PROGRAMS = $(call as,$(BINDIR)/caam-hotplug,config/program)

CONFIGURATION = $(SYSCONFDIR)/caam-hotplug/agent.toml

.PHONY: install uninstall

install:
	@rm -rf "$(DESTDIR)$(HOMEDIR)/caam_hotplug"
	@for pair in $(PROGRAMS); do \
	    install -D -m 0755 "$${pair%%=*}" "$(DESTDIR)$${pair#*=}" || exit; \
	done
	@for pair in $(FILES); do \
	    install -D -m 0644 "$${pair%%=*}" "$(DESTDIR)$${pair#*=}" || exit; \
	done
	@if [ "$(BINDIR)" != /usr/bin ]; then \
	    sed -i 's|=/usr/bin/caam-hotplug|=$(BINDIR)/caam-hotplug|' "$(DESTDIR)$(UNITDIR)"/caam-hotplug*.service; \
	fi
	@if [ "$(DATADIR)" != /usr/share ]; then \
	    sed -i '1s|/usr/share|$(DATADIR)|' "$(DESTDIR)$(DATADIR)/caam-hotplug/agent.toml"; \
	fi
	@if [ ! -e "$(DESTDIR)$(CONFIGURATION)" ]; then \
	    install -D -m 0644 "$(DESTDIR)$(DATADIR)/caam-hotplug/agent.toml" "$(DESTDIR)$(CONFIGURATION)"; \
	fi
	@if [ -n "$(COMPILE_WITH)" ]; then \
	    $(COMPILE_WITH) -m compileall -q $(if $(DESTDIR),-s "$(DESTDIR)") "$(DESTDIR)$(HOMEDIR)"; \
	fi

# The configuration stays: it is yours.
uninstall:
	@rm -rf "$(DESTDIR)$(HOMEDIR)/caam_hotplug"
	@for pair in $(PROGRAMS) $(FILES); do rm -f "$(DESTDIR)$${pair#*=}"; done
	@rm -rf "$(DESTDIR)$(HOMEDIR)" "$(DESTDIR)$(DATADIR)/caam-hotplug"
