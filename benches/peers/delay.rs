//! A link that takes its time: forwards a TCP port, every byte after a delay, as many bytes on the way as come.
//!
//! The kernels of build machines know no netem. This stands for it: it costs some CPU, and wakes up some 50 microseconds
//! late, for all contenders alike.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use crate::support::free_port;

/// Bytes of one receive.
const CHUNK: usize = 256 << 10;

/// A port that leads to another one, later. It ends with this process.
pub struct Link {
    /// Where it listens.
    pub port: u16,
}

impl Link {
    /// To a port of this machine, with a round trip of this time.
    pub fn new(target: u16, round_trip: Duration) -> Link {
        let port = free_port();
        let listener = TcpListener::bind(("127.0.0.1", port)).expect("a free port");
        std::thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                let Ok(far) = TcpStream::connect(("127.0.0.1", target)) else { continue };
                for socket in [&near, &far] {
                    let _ = socket.set_nodelay(true);
                }
                let (Ok(near_too), Ok(far_too)) = (near.try_clone(), far.try_clone()) else { continue };
                carry(near, far, round_trip / 2);
                carry(far_too, near_too, round_trip / 2);
            }
        });
        Link { port }
    }
}

fn carry(from: TcpStream, to: TcpStream, delay: Duration) {
    let (sender, receiver) = channel();
    std::thread::spawn(move || take(from, &sender, delay));
    std::thread::spawn(move || give(to, &receiver));
}

fn take(mut from: TcpStream, on_the_way: &Sender<(Instant, Vec<u8>)>, delay: Duration) {
    let mut buffer = vec![0; CHUNK];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        if on_the_way.send((Instant::now() + delay, buffer[..length].to_vec())).is_err() {
            break;
        }
    }
}

fn give(mut to: TcpStream, on_the_way: &Receiver<(Instant, Vec<u8>)>) {
    for (due, bytes) in on_the_way {
        let left = due.saturating_duration_since(Instant::now());
        if !left.is_zero() {
            std::thread::sleep(left);
        }
        if to.write_all(&bytes).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
}
