//! A server played by hand: the handshake is done for the test, the rest is the test's.

use std::future::Future;

use bytes::{BufMut, BytesMut};
use nbd::wire::{Framing, INIT_MAGIC, Info, OPTION_MAGIC, OptionCode, OptionHeader, OptionReply, OptionReplyHeader};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::task::JoinHandle;

/// Grants everything that is asked (extended headers only if the framing is that), says `info`, then hands the stream to
/// `play`. The first value is the client's end.
pub fn act<F: Future<Output = ()> + Send + 'static>(
    framing: Framing,
    info: Vec<Info>,
    play: impl FnOnce(DuplexStream) -> F + Send + 'static,
) -> (DuplexStream, JoinHandle<()>) {
    let (client, mut stream) = duplex(1 << 20);
    let acting = tokio::spawn(async move {
        let mut out = BytesMut::new();
        out.put_u64(INIT_MAGIC);
        out.put_u64(OPTION_MAGIC);
        out.put_u16(3);
        stream.write_all(&out).await.unwrap();
        stream.read_exact(&mut [0; 4]).await.unwrap();
        loop {
            let mut head = [0; OptionHeader::LENGTH];
            stream.read_exact(&mut head).await.unwrap();
            let OptionHeader { option, length } = OptionHeader::decode(&head).unwrap();
            stream.read_exact(&mut vec![0; length as usize]).await.unwrap();
            out.clear();
            if option == OptionCode::GO {
                for piece in &info {
                    let mut data = BytesMut::new();
                    piece.encode(&mut data);
                    OptionReplyHeader::encode(option, OptionReply::INFO, &data, &mut out);
                }
            }
            let refused = option == OptionCode::EXTENDED_HEADERS && framing != Framing::Extended;
            let reply = if refused { OptionReply::ERR_UNSUP } else { OptionReply::ACK };
            OptionReplyHeader::encode(option, reply, b"", &mut out);
            stream.write_all(&out).await.unwrap();
            if option == OptionCode::GO {
                return play(stream).await;
            }
        }
    });
    (client, acting)
}
