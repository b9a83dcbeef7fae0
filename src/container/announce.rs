//! Tells the network where a container's addresses are now: gratuitous ARP from its interfaces, when its network opens.
//!
//! A container that moves keeps its addresses, of both kinds. The switches between it and its clients learn where an
//! address is from packets that come from there; and a container that has nothing to say, because it waits to be asked,
//! would never be found: what clients send still goes to the host that it has left.

use std::{collections::HashMap, io, net::Ipv4Addr, os::fd::AsRawFd, path::Path};

use nix::{
    ifaddrs::{InterfaceAddress, getifaddrs},
    net::if_::InterfaceFlags,
    sched::{CloneFlags, setns},
    sys::socket::{AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, sendto, socket},
};

use super::Error;

/// How many addresses of one namespace are announced at most.
const MAX_ADDRESSES: usize = 64;
/// Hardware type and address sizes of ARP for IPv4 over Ethernet.
const ETHERNET: u16 = 1;

/// Announces every IPv4 address of the network namespace at `netns`. Returns how many were.
pub async fn announce(netns: &Path) -> Result<usize, Error> {
    let path = netns.to_owned();
    let (answer, answered) = tokio::sync::oneshot::channel();
    // A thread of its own, which ends in that namespace: no thread that goes on may ever be in it.
    let spawned = std::thread::Builder::new().name("announce".to_owned()).spawn(move || {
        let _ = answer.send(announce_from(&path));
    });
    let result = match spawned {
        Ok(_) => answered.await.unwrap_or_else(|_| Err(io::Error::other("its thread was lost"))),
        Err(error) => Err(error),
    };
    result.map_err(Error::io("announce the addresses of", netns))
}

fn announce_from(netns: &Path) -> io::Result<usize> {
    setns(std::fs::File::open(netns)?, CloneFlags::CLONE_NEWNET)?;
    let addresses = owned(getifaddrs()?);
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
    for (link, hardware, address) in &addresses {
        sendto(socket.as_raw_fd(), &gratuitous_arp(*hardware, *address), link, MsgFlags::empty())?;
    }
    Ok(addresses.len())
}

/// The IPv4 addresses on Ethernet interfaces that are up.
fn owned(all: impl Iterator<Item = InterfaceAddress>) -> Vec<(LinkAddr, [u8; 6], Ipv4Addr)> {
    let mut links = HashMap::new();
    let mut addresses = Vec::new();
    let useless = InterfaceFlags::IFF_LOOPBACK | InterfaceFlags::IFF_NOARP;
    for entry in all.filter(|entry| entry.flags.contains(InterfaceFlags::IFF_UP) && !entry.flags.intersects(useless)) {
        let Some(address) = entry.address else { continue };
        if let Some(link) = address.as_link_addr().filter(|link| link.hatype() == ETHERNET) {
            links.insert(entry.interface_name, *link);
        } else if let Some(address) = address.as_sockaddr_in() {
            addresses.push((entry.interface_name, address.ip()));
        }
    }
    let known = addresses.into_iter().filter_map(|(name, address)| {
        // A label (eth0:1) is an address of its interface.
        let link = links.get(name.split(':').next().unwrap_or(&name))?;
        Some((*link, link.addr()?, address))
    });
    known.take(MAX_ADDRESSES).collect()
}

/// An Ethernet frame to everybody that asks for the sender's own address, and so tells it.
fn gratuitous_arp(hardware: [u8; 6], address: Ipv4Addr) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(hardware);
    frame.extend(0x0806_u16.to_be_bytes());
    frame.extend(ETHERNET.to_be_bytes());
    frame.extend(0x0800_u16.to_be_bytes());
    // Sizes of the two kinds of addresses; 1 is a request.
    frame.extend([6, 4, 0, 1]);
    frame.extend(hardware);
    frame.extend(address.octets());
    frame.extend([0; 6]);
    frame.extend(address.octets());
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frame_is_an_arp_request_for_the_senders_own_address() {
        let frame = gratuitous_arp([2, 0, 0, 0, 0, 0x77], Ipv4Addr::new(10, 77, 0, 10));
        let expected =
            "ffffffffffff 020000000077 0806 0001 0800 06 04 0001 020000000077 0a4d000a 000000000000 0a4d000a";
        let hex: String = frame.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, expected.replace(' ', ""));
    }

    #[tokio::test]
    async fn a_namespace_that_is_not_there_is_named() {
        let error = announce(Path::new("/nonexistent/netns")).await.unwrap_err();
        assert!(error.to_string().contains("/nonexistent/netns"), "{error}");
    }
}
